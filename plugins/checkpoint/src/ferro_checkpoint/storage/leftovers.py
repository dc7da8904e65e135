"""What a process that was killed has left beside the checkpoints: put back, or removed, by the next save.

A directory of a save that may still go on, on this host or another, is left alone.
"""

from __future__ import annotations

import os
from contextlib import suppress

from ferro_checkpoint.layout.record import RECORD_NAME
from ferro_checkpoint.storage import system_calls
from ferro_checkpoint.storage.names import split_old, split_temporary, temporary_name
from ferro_checkpoint.storage.removal import remove_tree
from ferro_checkpoint.storage.saver import MOST_TOKEN_BYTES, TOKEN_NAME, Saver

OLD_S = 24 * 3600.0
"""After this time a save of another host has ended, and one without a token file was killed as it began."""


def settle_leftovers(parent: str, now_s: float) -> None:
    """Settle what killed saves have left.

    Args:
        parent: the directory of checkpoints.
        now_s: the time, by the clock of the disk, which may be another host's.
    """
    for name in _names(parent):
        if split_old(name):
            with suppress(OSError):
                _settle_old(parent, name, now_s)
    for name in _names(parent):
        split = split_temporary(name)
        if split and _may_go(parent, name, split[0], now_s):
            with suppress(OSError):
                remove_tree(os.path.join(parent, name))


def find_old(parent: str, name: str) -> str | None:
    """Return the directory that was `name` until a save took it away and was killed; None if there is no such one."""
    for other in _names(parent):
        split = split_old(other)
        if split and split[0] == name and _has_record(os.path.join(parent, other)):
            return other
    return None


def _settle_old(parent: str, old: str, now_s: float) -> None:
    split = split_old(old)
    if split is None:
        return
    name, token = split
    path = os.path.join(parent, old)
    if os.path.lexists(os.path.join(parent, name)) or not _has_record(path):
        remove_tree(path)
        return
    successor = temporary_name(name, token)
    if not os.path.lexists(os.path.join(parent, successor)) or _may_go(parent, successor, name, now_s):
        system_calls.rename(path, os.path.join(parent, name))


def _may_go(parent: str, temporary: str, name: str, now_s: float) -> bool:
    """Say whether a temporary directory belongs to no save that may still go on."""
    path = os.path.join(parent, temporary)
    try:
        with open(os.path.join(path, TOKEN_NAME), "rb") as file:
            saver = Saver.decode(file.read(MOST_TOKEN_BYTES))
            age_s = now_s - os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        # The last save that was to replace a checkpoint has exchanged the two, or was killed as it began.
        try:
            if _has_record(path):
                return _has_record(os.path.join(parent, name))
            return not os.listdir(path) and now_s - os.stat(path).st_mtime > OLD_S
        except OSError:
            return False
    except OSError:
        return False
    ended = saver.has_ended() if saver else None
    return age_s > OLD_S if ended is None else ended


def _has_record(path: str) -> bool:
    return os.path.lexists(os.path.join(path, RECORD_NAME))


def _names(parent: str) -> list[str]:
    try:
        return sorted(os.listdir(parent))
    except OSError:
        return []
