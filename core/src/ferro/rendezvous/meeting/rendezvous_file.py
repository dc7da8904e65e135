"""How ranks on one host find a store whose port was chosen freely: files in a private directory.

Where a launcher gives its ranks nothing but their numbers (mpiexec, torchrun), rank 0 posts its
store's address under a name that all ranks of the job can work out, and the others read it. The
directory belongs to this user alone, so nobody else can post there. A note outlives its process:
put something in the name that differs from job to job, and remove it when all have read it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ferro.errors import RendezvousError, UsageError
from ferro.rendezvous.auth import private_file
from ferro.rendezvous.auth.addresses import remaining_s

MAX_TEXT_BYTES = 4096
_KEPT_S = 24 * 3600.0

_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.05


def post(name: str, text: str, *, directory: Path | None = None) -> None:
    """Post a note, replacing one of the same name; readers see the old or the new one, whole.

    Args:
        name: any text; all ranks of the job, and of no other job, use the same.
        text: up to 4 KiB.
        directory: in place of `ferro-<user id>` in the system's temporary directory.

    Raises:
        UsageError: `text` is too long.
        RendezvousError: the directory cannot be used, or is not this user's alone.
    """
    content = text.encode()
    if len(content) > MAX_TEXT_BYTES:
        raise UsageError(f"a note takes at most {MAX_TEXT_BYTES} bytes, this one {len(content)}")
    note = _note(name, directory)
    draft = note.with_name(f"{note.name}.{secrets.token_hex(8)}")
    try:
        _clear_old(note.parent)
        private_file.create(draft, content)
        os.replace(draft, note)
    except OSError as exc:
        draft.unlink(missing_ok=True)
        raise RendezvousError(f"cannot post a note in {note.parent}: {exc}") from exc


def read(name: str, *, deadline: float, directory: Path | None = None) -> str:
    """Wait until a note of that name is posted; return its text.

    Args:
        name: as given to `post`.
        deadline: absolute `time.monotonic()` second; one that has passed looks once.
        directory: as given to `post`.

    Raises:
        RendezvousError: nobody posted it in time, or somebody else could have.
    """
    note = _note(name, directory)
    started = time.monotonic()
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return private_file.read(note, MAX_TEXT_BYTES).decode()
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError, private_file.NotPrivateError) as exc:
            raise RendezvousError(f"the note {name!r} cannot be trusted: {exc}. Remove it.") from exc
        left = remaining_s(deadline)
        if not left:
            raise RendezvousError(
                f"nobody posted {name!r} in {note.parent} within "
                f"{time.monotonic() - started:.1f} s. Read the log of rank 0 first; ranks on "
                f"several hosts need an address: use `ferro run`, or set MASTER_ADDR and "
                f"MASTER_PORT"
            )
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def remove(name: str, *, directory: Path | None = None) -> None:
    """Take the note down, if it is there.

    Raises:
        RendezvousError: the directory cannot be used, or is not this user's alone.
    """
    note = _note(name, directory)
    try:
        note.unlink(missing_ok=True)
    except OSError as exc:
        raise RendezvousError(f"cannot remove a note in {note.parent}: {exc}") from exc


def _clear_old(board: Path) -> None:
    """Take down notes of jobs that ended without doing so themselves."""
    for old in board.iterdir():
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _KEPT_S:
                old.unlink()


def _note(name: str, directory: Path | None) -> Path:
    """The file of a note; its name is a digest, so no name can lead out of the directory."""
    board = directory or Path(tempfile.gettempdir()) / f"ferro-{os.getuid()}"
    try:
        private_file.make_directory(board)
    except (OSError, private_file.NotPrivateError) as exc:
        raise RendezvousError(
            f"ranks on this host cannot meet in {board}: {exc}. It must be a directory of yours "
            f"alone (mode 0700): remove it, or have its owner do so."
        ) from exc
    return board / hashlib.sha256(name.encode()).hexdigest()[:32]
