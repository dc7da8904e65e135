"""ArrayHeader: the part of each message, of fixed size, that describes its array and its pass."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from ferro import CollectiveMismatch
from ferro.arrays import dtype_from_name, dtype_name, dtype_problem

from ...nn.arrays import Array
from .plan import OPS, PipelineCall

_MOST_DIMS = 32
_MOST_BYTES = 1 << 40
_ARRAY, _STOPPED, _TREE = 1, 2, 3
_LAYOUT = struct.Struct(f"<BBBBiiB16s{_MOST_DIMS}q")

HEADER_BYTES = _LAYOUT.size


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayHeader:
    """Description of the array that a message brings.

    Attributes:
        microbatch: number of the microbatch to which the array belongs.
        dtype: dtype of the array.
        shape: shape of the array.
        on_gpu: whether the array is a CuPy array, at the sender and so at the receiver.
        is_tree: whether the array has the bytes of a packed tree (see `packed_trees`).
    """

    microbatch: int
    dtype: np.dtype
    shape: tuple[int, ...]
    on_gpu: bool
    is_tree: bool = False

    @classmethod
    def of(cls, array: Array, microbatch: int, *, is_tree: bool = False) -> ArrayHeader:
        """Describe an array."""
        return cls(
            microbatch=microbatch,
            dtype=array.dtype,
            shape=array.shape,
            on_gpu=not isinstance(array, np.ndarray),
            is_tree=is_tree,
        )

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self) -> Array:
        """Return memory for the array."""
        if self.on_gpu:
            import cupy  # CuPy is installed, because the sender and this rank's stages use it

            memory: Array = cupy.empty(self.shape, self.dtype)
            return memory
        return np.empty(self.shape, self.dtype)


def encode(call: PipelineCall, header: ArrayHeader | None, *, next_is_repeated: bool = False) -> Array:
    """Encode a header as bytes, (HEADER_BYTES,) uint8.

    Args:
        call: the call that the sender executes.
        header: describes the array; None says that the sender has stopped.
        next_is_repeated: whether the next message of this edge is a repeated one (see `repeated_messages`).
    """
    call_fields = OPS.index(call.op), call.microbatches
    if header is None:
        raw = _LAYOUT.pack(_STOPPED, 0, 0, *call_fields, 0, next_is_repeated, b"", *[0] * _MOST_DIMS)
    else:
        ndim, name = len(header.shape), dtype_name(header.dtype).encode()
        dims = header.shape + (0,) * (_MOST_DIMS - ndim)
        kind = _TREE if header.is_tree else _ARRAY
        raw = _LAYOUT.pack(kind, header.on_gpu, ndim, *call_fields, header.microbatch, next_is_repeated, name, *dims)
    return np.frombuffer(raw, np.uint8)


def decode(raw: Array) -> tuple[PipelineCall, ArrayHeader | None, bool]:
    """Return the call and the header that were encoded, and whether the next message is a repeated one.

    Raises:
        CollectiveMismatch: these bytes are no header; the sender runs another program.
    """
    kind, on_gpu, ndim, op, microbatches, microbatch, repeated, name, *dims = _LAYOUT.unpack(raw.tobytes())
    if op >= len(OPS):
        raise _unreadable(f"its call is {op}")
    call = PipelineCall(OPS[op], microbatches)
    if kind == _STOPPED:
        return call, None, bool(repeated)
    shape = tuple(dims[:ndim])
    try:
        dtype = dtype_from_name(name.rstrip(b"\0").decode())
        fault = dtype_problem(dtype)
    except (TypeError, ValueError) as error:
        raise _unreadable(f"its dtype is {name!r}") from error
    if kind not in (_ARRAY, _TREE) or ndim > _MOST_DIMS or on_gpu > 1:
        fault = f"it begins with {kind}, {on_gpu}, {ndim}"
    elif any(dim < 0 for dim in shape) or math.prod(shape) * dtype.itemsize > _MOST_BYTES:
        fault = f"its shape is {shape}"
    if fault:
        raise _unreadable(fault)
    header = ArrayHeader(microbatch=microbatch, dtype=dtype, shape=shape, on_gpu=bool(on_gpu), is_tree=kind == _TREE)
    return call, header, bool(repeated)


def _unreadable(fault: str) -> CollectiveMismatch:
    return CollectiveMismatch(
        f"Pipeline: what came is no header of an array: {fault}. Run the same version of "
        "ferro-strategies on every rank.",
        op="recv",
    )
