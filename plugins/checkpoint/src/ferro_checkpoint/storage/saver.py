"""The token file: which save a temporary directory belongs to, and whether the process that began it has ended."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from ferro_checkpoint.layout.json_text import UnreadableJson, read_json, write_json

TOKEN_NAME = ".ferro-save"  # noqa: S105
MOST_TOKEN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Saver:
    """The process that makes a directory.

    Attributes:
        token: of the save.
        host: its name.
        system: tells two systems apart that have one name: the boot of the kernel, and the space of process numbers,
            for containers may share a host's name.
        pid: of the process.
        started: when it was started, as the kernel counts, for process numbers come again.
    """

    token: str
    host: str
    system: str
    pid: int
    started: str

    @classmethod
    def this(cls, token: str) -> Saver:
        """Describe this process."""
        return cls(token, socket.gethostname(), _system(), os.getpid(), _started(os.getpid()) or "")

    @classmethod
    def decode(cls, text: bytes) -> Saver | None:
        """Read a token file; None if it is none, or was not written to its end."""
        try:
            content = read_json(text)
        except UnreadableJson:
            return None
        kinds = {"token": str, "host": str, "system": str, "pid": int, "started": str}
        if not isinstance(content, dict) or {name: type(value) for name, value in content.items()} != kinds:
            return None
        return cls(**content)

    def encode(self) -> bytes:
        """Write the token file."""
        return write_json(asdict(self))

    def has_ended(self) -> bool | None:
        """Say whether the process has ended; None if it was one of another system, of which nothing is known."""
        if (self.host, self.system) != (socket.gethostname(), _system()):
            return None
        if _system():
            return _started(self.pid) != self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


@cache
def _system() -> str:
    """Identify this running system; "" where it has no identity."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Return when a process was started; None if none has this number, or one that has ended and is a zombie."""
    try:
        about = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = about[about.rindex(b")") + 2 :].split()  # the program's name before it may have spaces
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()
