"""Messages between a cluster and its ranks: functions, results and errors, pickled.

A message goes over a socket that a rank inherits from the process that started it. Nobody else has that socket, so what
comes from there may be unpickled.
"""

from __future__ import annotations

import importlib
import pickle
import struct
from collections.abc import Callable, Iterator
from typing import Any, cast

from ferro.errors import UsageError

_HEADER = struct.Struct("!Q")


_LIBRARY = "cloudpickle"
_REMEDY = f"pip install {_LIBRARY}"


def pack(value: object, what: str) -> bytes:
    """Pickle a value, with the library for functions where that is installed; UsageError says what cannot be sent."""
    dumps = _library_dumps()
    try:
        return (dumps or pickle.dumps)(value)
    except Exception as error:
        hint = "" if dumps else f"; functions and classes that no module holds need a library: {_REMEDY}"
        raise UsageError(f"{what} cannot be sent between processes: {error}{hint}") from error


def pack_call(function: Callable[..., object], arguments: tuple[object, ...]) -> bytes:
    """Pickle a call; UsageError says that it cannot be, or not without the library.

    Plain pickle writes down a function by its name only, which a rank cannot find in the notebook or program itself.
    """
    name = getattr(function, "__qualname__", repr(function))
    if getattr(function, "__module__", "") == "__main__" and _library_dumps() is None:
        raise UsageError(
            f"{name} is defined in the notebook or program itself, which other processes cannot import: {_REMEDY}, or "
            "put the function into a module"
        )
    return pack((function, arguments), f"{name} with its arguments")


def _library_dumps() -> Callable[[object], bytes] | None:
    """Find the optional library that pickles functions by their code."""
    try:
        return cast("Callable[[object], bytes]", importlib.import_module(_LIBRARY).dumps)
    except ImportError:
        return None


def unpack(data: bytes) -> Any:
    """Make again what the other end packed."""
    return pickle.loads(data)  # noqa: S301 - written by the process at the other end of the inherited socket


def frame(data: bytes) -> bytes:
    """Put the length before a message."""
    return _HEADER.pack(len(data)) + data


class Inbox:
    """Cuts what comes from a socket into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def receive(self, data: bytes) -> None:
        self._data += data

    def take(self) -> Iterator[bytes]:
        """Take out the messages that are complete."""
        while len(self._data) >= _HEADER.size:
            end = _HEADER.size + int(_HEADER.unpack_from(self._data)[0])
            if len(self._data) < end:
                return
            message = bytes(self._data[_HEADER.size : end])
            del self._data[:end]
            yield message
