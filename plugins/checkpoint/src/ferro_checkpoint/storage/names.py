"""Names of directories: a checkpoint's own, and those that it has while it is written or replaced.

step-500                  a checkpoint
.tmp-step-500-TOKEN       is written; its token file says by which process
.old-step-500-TOKEN       was step-500 until the save of this token took its place, and will be removed
"""

from __future__ import annotations

import os
import re

from ferro_checkpoint.errors import StateError
from ferro_checkpoint.layout.record import is_file_name

_TEMPORARY, _OLD = ".tmp-", ".old-"
_TOKEN = re.compile(r"[A-Za-z0-9_]{1,64}")
MOST_NAME_BYTES = 255  # of a file system


def check_within(name: str) -> None:
    """Check that this is a name in a directory, and does not lead out of it; for reading.

    Raises:
        StateError: it does.
    """
    if not is_file_name(name):
        raise StateError(f"{name!r} cannot be the name of a checkpoint: choose one without '/' and '\\\\'")


def check_name(name: str, token: str | None = None) -> None:
    """Check that a new checkpoint may have this name, and that the token may be part of a name.

    Raises:
        StateError: it would be outside, or look like a temporary one, or be too long.
    """
    check_within(name)
    if is_temporary(name):
        raise StateError(f"{name!r} looks like the name of a checkpoint that is being written: choose another one")
    if token is not None and not _TOKEN.fullmatch(token):
        raise StateError(f"{token!r} cannot be the token of a save: letters and digits can")
    longest = temporary_name(name, token or "")
    if len(os.fsencode(longest)) > MOST_NAME_BYTES:
        raise StateError(
            f"{name!r} is too long for the name of a checkpoint: while it is written it is {longest!r}, and file "
            f"systems take {MOST_NAME_BYTES} bytes; choose a shorter one"
        )


def is_temporary(name: str) -> bool:
    """Say whether this is the name of a directory that is written or was replaced."""
    return name.startswith((_TEMPORARY, _OLD))


def temporary_name(name: str, token: str) -> str:
    """Return the name of a checkpoint's directory while it is written."""
    return f"{_TEMPORARY}{name}-{token}"


def old_name(name: str, token: str) -> str:
    """Return the name of a checkpoint that has been replaced by the save of this token."""
    return f"{_OLD}{name}-{token}"


def split_old(name: str) -> tuple[str, str] | None:
    """Return the name and the token of a directory that was replaced; None for any other."""
    return _split(name, _OLD)


def split_temporary(name: str) -> tuple[str, str] | None:
    """Return the name and the token of a directory that is written; None for any other."""
    return _split(name, _TEMPORARY)


def _split(name: str, prefix: str) -> tuple[str, str] | None:
    own, dash, token = name.removeprefix(prefix).rpartition("-")
    if not name.startswith(prefix) or not dash or not own or not _TOKEN.fullmatch(token):
        return None
    return own, token
