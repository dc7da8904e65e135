"""Calls of an object store: tried again after a failure that passes, and told as errors of checkpoints."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from ferro_checkpoint.errors import CheckpointError
from ferro_checkpoint.layout.record import RECORD_NAME
from ferro_checkpoint.storage.failures import failed
from ferro_checkpoint.storage.saver import TOKEN_NAME

_Result = TypeVar("_Result")
_PAUSES_S = (0.1, 0.5, 2.0)
_PASSING = frozenset({errno.EAGAIN, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN})
_MAY_BE_ABSENT = ("read", "listed", "removed")
_LAST = {RECORD_NAME: -1, TOKEN_NAME: 1}


def call_store(what: str, path: str, call: Callable[[], _Result]) -> _Result:
    """Call a store, again after a failure of the network; the call has the same effect once and twice.

    Args:
        what: the participle for the message "… cannot be WHAT".
        path: for the message.
        call: the call.

    Raises:
        FileNotFoundError: there is no such object to be read, listed or removed.
        CheckpointError: any other failure, for each store has errors of its own.
    """
    for pause_s in (*_PAUSES_S, None):
        try:
            return call()
        except Exception as error:
            if isinstance(error, FileNotFoundError) and what in _MAY_BE_ABSENT:
                raise
            if pause_s is None or not _passes(error):
                raise told(what, path, error) from error
            time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


def told(what: str, path: str, error: Exception) -> CheckpointError:
    """Describe the failure of a store."""
    if isinstance(error, OSError) and error.strerror:
        return failed(what, path, error)
    return CheckpointError(f"{path} cannot be {what}: {type(error).__name__}: {error}", path=path)


def _passes(error: Exception) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING


def remove_objects(store: Any, key: str, path: str, names: Iterable[str]) -> None:
    """Remove the objects of a directory: the record first, the token last; one that is gone is no error."""
    for name in sorted(names, key=lambda name: (_LAST.get(name, 0), name)):
        with suppress(FileNotFoundError):
            call_store("removed", f"{path}/{name}", partial(store.rm_file, f"{key}/{name}"))
    with suppress(Exception):  # a store of objects has no directory to remove, and each says so in its way
        store.rmdir(key)
