"""Rendezvous files, by which the ranks of one host find a store on a free port.

Where a launcher gives its ranks nothing but their numbers (mpiexec, torchrun), rank 0 writes its store's address to a
file whose name all ranks of the job can derive, and the others read it. The directory belongs to this user alone, so
nobody else can write there. A file outlives its process: choose a name that differs from job to job, and remove the
file when all have read it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ferro.errors import RendezvousError, UsageError
from ferro.rendezvous.auth import private_file
from ferro.rendezvous.sockets import remaining_s

MAX_TEXT_BYTES = 4096

_REMEDY = (
    "Set TMPDIR to a directory where you may write, the same for all ranks of this host; or start them with "
    "`ferro run`; or set MASTER_ADDR=127.0.0.1 and MASTER_PORT to a free port."
)
_KEPT_S = 24 * 3600.0
_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.05


def write(name: str, text: str, *, directory: Path | None = None) -> None:
    """Write up to 4 KiB to a file, replacing one of the same name; readers see the old or the new one, whole.

    `name` is any text, the same on all ranks of the job; `directory` is by default `ferro-<user id>` in the system's
    temporary directory. RendezvousError says that the directory cannot be used, or is not this user's alone.
    """
    content = text.encode()
    if len(content) > MAX_TEXT_BYTES:
        raise UsageError(f"a rendezvous file takes at most {MAX_TEXT_BYTES} bytes, this one {len(content)}")
    path = _path(name, directory)
    try:
        for old in path.parent.iterdir():  # files of jobs that ended without removing them
            with suppress(OSError):
                if time.time() - old.stat().st_mtime > _KEPT_S:
                    old.unlink()
        private_file.write(path, content, os.replace)
    except OSError as exc:
        raise RendezvousError(f"cannot write a rendezvous file in {path.parent}: {exc}. {_REMEDY}") from exc


def read(name: str, *, deadline: float, directory: Path | None = None) -> str:
    """Wait for a file until `deadline`; RendezvousError says that no rank wrote it, or another user could have."""
    path = _path(name, directory)
    started = time.monotonic()
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return private_file.read(path, MAX_TEXT_BYTES).decode()
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError, private_file.NotPrivateError) as exc:
            raise RendezvousError(f"the rendezvous file {name!r} cannot be trusted: {exc}. Remove it.") from exc
        left_s = remaining_s(deadline)
        if not left_s:
            raise RendezvousError(
                f"no rank wrote the rendezvous file {name!r} in {path.parent} within {time.monotonic() - started:.1f} "
                "s. Read the log of rank 0 first; ranks on several hosts need an address: use `ferro run`, or set "
                "MASTER_ADDR and MASTER_PORT"
            )
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def remove(name: str, *, directory: Path | None = None) -> None:
    path = _path(name, directory)
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise RendezvousError(f"cannot remove a rendezvous file in {path.parent}: {exc}") from exc


def _path(name: str, directory: Path | None) -> Path:
    """Make the directory, or check it; a file's name is a digest, so no name leads out of the directory."""
    try:
        directory = directory or Path(tempfile.gettempdir()) / f"ferro-{os.getuid()}"
    except OSError as exc:  # such as a container whose root directory is read-only
        raise RendezvousError(
            f"ranks of one host meet through a file, and there is no place for it: {exc}. {_REMEDY}"
        ) from exc
    try:
        private_file.make_directory(directory)
    except (OSError, private_file.NotPrivateError) as exc:
        raise RendezvousError(
            f"ranks on this host cannot meet in {directory}: {exc}. It must be a directory of yours alone (mode 0700): "
            f"remove it, or have its owner do so. {_REMEDY}"
        ) from exc
    return directory / hashlib.sha256(name.encode()).hexdigest()[:32]
