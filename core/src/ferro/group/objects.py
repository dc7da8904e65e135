"""Collectives on small Python values: encoded, then moved as bytes by the array collectives.

Each is made of several operations; `left_s` tells what is left of the caller's deadline.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from ferro.errors import UsageError
from ferro.rendezvous import codec as msgpack
from ferro.types import Array

if TYPE_CHECKING:
    from ferro.group.array_collectives import ArrayCollectives
    from ferro.group.process_group import ProcessGroup

Codec: TypeAlias = Literal["msgpack", "pickle"]

# These are for small values; arrays have better ways. No rank can make another take more.
MAX_BYTES = 1 << 30


def broadcast(group: ArrayCollectives, value: object, root: int, codec: Codec, left_s: Callable[[], float]) -> Any:
    """Return the root's value on every rank."""
    _check(codec)
    data = _encode(value, codec) if group.rank == root else np.empty(0, np.uint8)
    size = group.broadcast(np.array(data.size), root, timeout_s=left_s())
    if group.rank != root:
        data = _room(size)
    return _decode(group.broadcast(data, root, timeout_s=left_s()), codec)


def all_gather(group: ArrayCollectives, value: object, codec: Codec, left_s: Callable[[], float]) -> list[Any]:
    """Return every rank's value, in order of rank."""
    data = _encode(value, codec)
    sizes = group.all_gather(np.array(data.size), timeout_s=left_s()).tolist()
    return _split(group.all_gather(data, sizes=sizes, timeout_s=left_s()), sizes, codec)


def gather(
    group: ArrayCollectives, value: object, root: int, codec: Codec, left_s: Callable[[], float]
) -> list[Any] | None:
    """Return every rank's value at the root."""
    data = _encode(value, codec)
    sizes = group.all_gather(np.array(data.size), timeout_s=left_s()).tolist()
    whole = group.gather(data, root, sizes=sizes, timeout_s=left_s())
    return None if whole is None else _split(whole, sizes, codec)


def scatter(
    group: ArrayCollectives, values: Sequence[object] | None, root: int, codec: Codec, left_s: Callable[[], float]
) -> Any:
    """Return this rank's item of the root's list."""
    _check(codec)
    if group.rank != root:
        return _decode(group.scatter(None, root, timeout_s=left_s()), codec)
    if values is None or len(values) != group.world_size:
        given = "none" if values is None else str(len(values))
        raise UsageError(f"scatter_object needs {group.world_size} values at the root, got {given}")
    parts = [_encode(value, codec) for value in values]
    sizes = [part.size for part in parts]
    whole = np.concatenate(parts)
    return _decode(group.scatter(whole, root, sizes=sizes, timeout_s=left_s()), codec)


def send(group: ProcessGroup, value: object, dst: int, tag: int, codec: Codec, left_s: Callable[[], float]) -> None:
    """Send a value to one rank: its size, then its bytes."""
    data = _encode(value, codec)
    group.send(np.array(data.size), dst, tag, timeout_s=left_s())
    group.send(data, dst, tag, timeout_s=left_s())


def recv(group: ProcessGroup, src: int, tag: int, codec: Codec, left_s: Callable[[], float]) -> Any:
    """Return a value that one rank sends."""
    _check(codec)
    size = group.recv(np.array(0), src, tag, timeout_s=left_s())
    data = group.recv(_room(size), src, tag, timeout_s=left_s())
    return _decode(data, codec)


def _check(codec: Codec) -> None:
    if codec not in ("msgpack", "pickle"):
        raise UsageError(f"codec must be 'msgpack' or 'pickle', not {codec!r}")


def _encode(value: object, codec: Codec) -> Array:
    _check(codec)
    data = msgpack.encode(value) if codec == "msgpack" else pickle.dumps(value)
    if len(data) > MAX_BYTES:
        raise UsageError(f"a value of {len(data)} bytes is too large: at most {MAX_BYTES} travel")
    return np.frombuffer(data, np.uint8)


def _room(size: Array) -> Array:
    """Return memory for a value of the size that another rank tells."""
    if not 0 <= int(size) <= MAX_BYTES:
        raise UsageError(f"another rank announces a value of {int(size)} bytes, which is refused")
    return np.empty(int(size), np.uint8)


def _decode(data: Array, codec: Codec) -> object:
    raw = data.tobytes()
    # Only where the caller asked for pickle by name; msgpack is the default everywhere.
    return msgpack.decode(raw) if codec == "msgpack" else pickle.loads(raw)  # noqa: S301


def _split(whole: Array, sizes: Sequence[int], codec: Codec) -> list[Any]:
    ends = np.cumsum(sizes)
    return [_decode(whole[end - size : end], codec) for end, size in zip(ends, sizes, strict=True)]
