"""Removing a directory so that at no time a part of it looks like a whole checkpoint."""

from __future__ import annotations

import os
from contextlib import suppress

from ferro_checkpoint.layout.record import RECORD_NAME
from ferro_checkpoint.storage import system_calls
from ferro_checkpoint.storage.saver import TOKEN_NAME

_LAST = {RECORD_NAME: -1, TOKEN_NAME: 1}


def remove_tree(path: str) -> None:
    """Remove a directory and all in it, without following links: the record first, the token file last.

    A file that another process removes meanwhile is no error.
    """
    with suppress(FileNotFoundError):
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda entry: _LAST.get(entry.name, 0))
        for entry in found:
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    remove_tree(entry.path)
                else:
                    system_calls.remove_file(entry.path)
        system_calls.remove_directory(path)
