"""The label of a call, by which ranks notice that they make different calls.

Ranks of a group must make the same calls in the same order. A `Call` packs into a label of `LABEL_BYTES` bytes. A
backend puts the label into its frames (or the default agreement sends it by itself) and compares it, so that a
difference is an error that names both calls and never a wrong sum.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from ferro.arrays import dtype_name
from ferro.errors import CollectiveMismatch
from ferro.types import Array

if TYPE_CHECKING:
    import numpy as np

_LABEL = struct.Struct("<BB10siQI28s")  # 56 bytes, aligned
LABEL_BYTES = _LABEL.size
_DETAIL_BYTES = 28

_PLAIN = ("all_reduce", "broadcast", "reduce", "all_gather", "gather", "scatter", "reduce_scatter", "all_to_all")
OPS = ("barrier", *_PLAIN, "send", "scan", "exscan", "min_loc", "max_loc", "persistent")
_REDUCTIONS = ("", "sum", "mean", "prod", "min", "max", "band", "bor", "bxor", "callable")

# A message tag has 64 bits: the group's context, whether it belongs to a collective, a number.
_NUMBER_BITS = 39
MAX_TAG = (1 << 31) - 1
MAX_CONTEXT = (1 << 24) - 1


@dataclass(slots=True, unsafe_hash=True)  # not frozen, since `numbered` would take four times as long
class Call:
    """One call on a group, as every rank must make it; calls are shared, so nothing changes one.

    Attributes:
        op: name of the operation, one of `OPS` ("send" stands for both ends of a transfer).
        seq: number of the collective in its group, from 0.
        dtype: NumPy name of the element type, "" where there are no elements.
        count: elements in each rank's buffer; in all buffers together, where their sizes are uneven.
        reduction: name of the reduction, "callable" for a user's function, "" for none.
        root: the root, or -1.
        detail: the shape, or uneven sizes, as text. The label carries its beginning, for messages, and a checksum of
            all of it.
        is_step: True for a step of a persistent operation, on which the ranks agreed when they made it.
        packed: the label, once it is computed; calls that differ only in `seq` share it.
    """

    op: str
    seq: int = 0
    dtype: str = ""
    count: int = 0
    reduction: str = ""
    root: int = -1
    detail: str = ""
    is_step: bool = field(default=False, compare=False)
    packed: bytes = field(default=b"", init=False, repr=False, compare=False)

    def label(self) -> bytes:
        """Pack the call into `LABEL_BYTES` bytes, which must be equal on all ranks."""
        if not self.packed:
            self.packed = _LABEL.pack(
                OPS.index(self.op),
                _REDUCTIONS.index(self.reduction),
                self.dtype.encode(),
                self.root,
                self.count,
                zlib.crc32(self.detail.encode()),
                self.detail.encode()[:_DETAIL_BYTES],
            )
        return self.packed

    def numbered(self, seq: int) -> Call:
        """Copy this call with number `seq`, in a fraction of the time of `dataclasses.replace`."""
        copy = Call(self.op, seq, self.dtype, self.count, self.reduction, self.root, self.detail, self.is_step)
        copy.packed = self.packed or self.label()
        return copy

    @classmethod
    def from_label(cls, label: bytes) -> Call:
        """Unpack a label for an error message, which shows unknown codes as numbers."""
        op, reduction, dtype, root, count, _, detail = _LABEL.unpack(label)
        return cls(
            op=OPS[op] if op < len(OPS) else f"operation {op}",
            dtype=dtype.rstrip(b"\0").decode("ascii", "replace"),
            count=count,
            reduction=_REDUCTIONS[reduction] if reduction < len(_REDUCTIONS) else "?",
            root=root,
            detail=detail.rstrip(b"\0").decode("ascii", "replace") + "…" * (detail[-1] != 0),
        )

    def __str__(self) -> str:
        words = (
            self.dtype and f"{self.count} x {self.dtype}",
            self.reduction and f"op={self.reduction}",
            f"root={self.root}" if self.root >= 0 else "",
            self.detail,
        )
        return f"{self.op}({', '.join(filter(None, words))})"


@lru_cache(maxsize=512)
def array_call(
    op: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    reduction: str = "",
    root: int = -1,
    sizes: tuple[int, ...] | None = None,
) -> Call:
    """Describe a collective on arrays; `sizes` are the rows of every rank's block, where they differ.

    The calls are cached, since programs repeat them.
    """
    detail, count = _shape_text(shape), math.prod(shape)
    if sizes is not None:
        detail = f"sizes {','.join(map(str, sizes))} of {_shape_text(shape[1:])}"
        count = sum(sizes) * math.prod(shape[1:])
    detail += _whole_name(dtype)
    return Call(op, 0, dtype.name, count, reduction, root, detail)


def persistent_call(call: Call, number: int) -> Call:
    """Describe a step of a group's persistent operation with this number, which differs from every other call."""
    return replace(call, detail=", ".join(filter(None, (f"persistent {number}", call.detail))), is_step=True)


@lru_cache(maxsize=128)
def uneven_call(op: str, dtype: np.dtype, row_shape: tuple[int, ...]) -> Call:
    """Describe a collective on arrays whose numbers of rows only their own ranks know."""
    return Call(op, dtype=dtype.name, detail=f"uneven rows of {_shape_text(row_shape)}{_whole_name(dtype)}")


def _whole_name(dtype: np.dtype) -> str:
    """Name a dtype of dates or structures, for which the label's field is too short."""
    return f" of {name}" if (name := dtype_name(dtype)) != dtype.name else ""


def _shape_text(shape: tuple[int, ...]) -> str:
    return f"shape {'x'.join(map(str, shape)) or 'scalar'}"


def transfer_call(buffer: Array) -> Call:
    """Describe the transfer of this buffer, in the same way on both of its ends."""
    return Call("send", dtype=dtype_name(buffer.dtype), count=buffer.size)


def collective_tag(seq: int) -> int:
    """Compute the tag of all messages of collective number `seq` of a group."""
    return 1 << _NUMBER_BITS | seq


def in_context(tag: int, context: int) -> int:
    """Move `tag` to the tag space of the group numbered `context`."""
    return context << (_NUMBER_BITS + 1) | tag


def is_collective(tag: int) -> bool:
    """Say whether a tag belongs to a collective, and not to a transfer."""
    return bool(tag >> _NUMBER_BITS & 1)


def context_of(tag: int) -> int:
    """Extract the number of the group that a tag belongs to."""
    return tag >> (_NUMBER_BITS + 1)


def compare_labels(rank: int, call: Call, peer: int, label: bytes) -> None:
    """Raise CollectiveMismatch if the label that `peer` sent differs from that of this rank's call."""
    if label != (call.packed or call.label()):
        raise mismatch(rank, call, peer, label)


def mismatch(rank: int, mine: Call, peer: int, label: bytes) -> CollectiveMismatch:
    """Make the error for a label of `peer` that differs from this rank's call."""
    if mine.op == "send":  # one label stands for both ends of a transfer, and the receiver compares
        mine = replace(mine, op="recv")
    theirs = Call.from_label(label)
    text = f"rank {rank} called {mine}; rank {peer} called {theirs}"
    if mine.op in ("all_gather", "gather") and (mine.op, mine.dtype, mine.root) == (
        theirs.op,
        theirs.dtype,
        theirs.root,
    ):
        text += ': where the ranks have different numbers of rows, give sizes="any", or the list of all ranks\' rows'
    return CollectiveMismatch(text, peer=peer)
