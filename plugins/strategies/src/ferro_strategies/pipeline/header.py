"""Header: what each message tells of its array and its pass, in a fixed size."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from ferro import CollectiveMismatch
from ferro.arrays import dtype_named, name_of, objection

from ..nn.arrays import Array
from .call import OPS, Call

_MOST_DIMS = 32
_MOST_BYTES = 1 << 40
_ARRAY, _STOPPED = 1, 2
_LAYOUT = struct.Struct(f"<BBBBii16s{_MOST_DIMS}q")

HEADER_BYTES = _LAYOUT.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a message brings.

    Attributes:
        microbatch: to which the array belongs.
        dtype: of the array.
        shape: of the array.
        on_gpu: whether the sender has it as a CuPy array, and the receiver is to.
    """

    microbatch: int
    dtype: np.dtype
    shape: tuple[int, ...]
    on_gpu: bool

    @classmethod
    def of(cls, array: Array, microbatch: int) -> Header:
        """Return the header of an array."""
        return cls(
            microbatch=microbatch,
            dtype=array.dtype,
            shape=array.shape,
            on_gpu=not isinstance(array, np.ndarray),
        )

    @property
    def nbytes(self) -> int:
        """Size of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self) -> Array:
        """Return memory for the array."""
        if self.on_gpu:
            import cupy  # as the sender has, and this rank's own stages

            memory: Array = cupy.empty(self.shape, self.dtype)
            return memory
        return np.empty(self.shape, self.dtype)


def encode(call: Call, header: Header | None) -> Array:
    """Return a message's head, (HEADER_BYTES,) uint8.

    Args:
        call: in which the sender is.
        header: of the array; None says that the sender has stopped.
    """
    told = OPS.index(call.op), call.microbatches
    if header is None:
        raw = _LAYOUT.pack(_STOPPED, 0, 0, *told, 0, b"", *[0] * _MOST_DIMS)
    else:
        ndim, name = len(header.shape), name_of(header.dtype).encode()
        dims = header.shape + (0,) * (_MOST_DIMS - ndim)
        raw = _LAYOUT.pack(_ARRAY, header.on_gpu, ndim, *told, header.microbatch, name, *dims)
    return np.frombuffer(raw, np.uint8)


def decode(raw: Array) -> tuple[Call, Header | None]:
    """Return what `encode` was given.

    Raises:
        CollectiveMismatch: no header reads so; the sender runs something else.
    """
    kind, on_gpu, ndim, op, microbatches, microbatch, name, *dims = _LAYOUT.unpack(raw.tobytes())
    if op >= len(OPS):
        raise _unreadable(f"its call is {op}")
    call = Call(OPS[op], microbatches)
    if kind == _STOPPED:
        return call, None
    shape = tuple(dims[:ndim])
    try:
        dtype = dtype_named(name.rstrip(b"\0").decode())
        fault = objection(dtype)
    except (TypeError, ValueError) as error:
        raise _unreadable(f"its dtype is {name!r}") from error
    if kind != _ARRAY or ndim > _MOST_DIMS or on_gpu > 1:
        fault = f"it begins with {kind}, {on_gpu}, {ndim}"
    elif any(dim < 0 for dim in shape) or math.prod(shape) * dtype.itemsize > _MOST_BYTES:
        fault = f"its shape is {shape}"
    if fault:
        raise _unreadable(fault)
    return call, Header(microbatch=microbatch, dtype=dtype, shape=shape, on_gpu=bool(on_gpu))


def _unreadable(fault: str) -> CollectiveMismatch:
    return CollectiveMismatch(
        f"Pipeline: what came is no header of an array: {fault}. Run the same version of "
        "ferro-strategies on every rank.",
        op="recv",
    )
