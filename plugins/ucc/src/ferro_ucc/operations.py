"""The arguments of UCC's collectives, from NumPy buffers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from ferro.types import Array
from ferro_ucc import abi
from ferro_ucc.reductions import UccReduction

_BYTES = abi.UccDatatype.UINT8
_WIDE = abi.ArgsFlag.COUNT_64BIT | abi.ArgsFlag.DISPLACEMENTS_64BIT


@dataclass(slots=True)
class Operation:
    """One collective: its arguments for UCC, and the objects that own the memory to which they point.

    Attributes:
        args: the arguments.
        used: objects that must live until the operation has ended.
    """

    args: abi.CollArgs
    used: list[object] = field(default_factory=list)

    @classmethod
    def make(cls, kind: abi.CollType, flags: int = 0, root: int = 0) -> Operation:
        """Make an operation without buffers."""
        args = abi.CollArgs(mask=abi.ARGS_FIELD_FLAGS, coll_type=kind, flags=flags, root=root)
        args.src.info.mem_type = args.dst.info.mem_type = abi.MEMORY_UNKNOWN
        return cls(args)

    def whole(self, side: abi.CollBuffer, buffer: Array, datatype: int, count: int) -> None:
        """Set source or destination to one buffer of `count` elements."""
        side.info = abi.BufferInfo(_address(buffer), count, datatype, abi.MEMORY_HOST)
        self.used.append(buffer)

    def blocks(self, side: abi.CollBuffer, buffer: Array, datatype: int, counts: Sequence[int]) -> None:
        """Set source or destination to consecutive blocks, one per rank."""
        table = (ctypes.c_uint64 * (2 * len(counts)))(*counts, *accumulate(counts[:-1], initial=0))
        start = ctypes.addressof(table)
        side.info_v = abi.BufferInfoV(_address(buffer), start, start + 8 * len(counts), datatype, abi.MEMORY_HOST)
        self.used += [buffer, table]


def all_gather(buffer: Array, counts: Sequence[int]) -> Operation:
    """Fill `buffer` with a block from each rank; this rank's block is in its place."""
    if min(counts) == max(counts):
        operation = Operation.make(abi.CollType.ALL_GATHER, abi.ArgsFlag.IN_PLACE)
        operation.whole(operation.args.dst, buffer, _BYTES, buffer.nbytes)
        return operation
    operation = Operation.make(abi.CollType.ALL_GATHER_V, abi.ArgsFlag.IN_PLACE | _WIDE)
    operation.blocks(operation.args.dst, buffer, _BYTES, _in_bytes(counts, buffer))
    return operation


def all_to_all(source: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Operation:
    """Send block j of `source` to rank j; block i of `out` comes from rank i.

    The operation has sizes even where they are equal, since one rank does not know whether they are equal on all ranks.
    """
    operation = Operation.make(abi.CollType.ALL_TO_ALL_V, _WIDE)
    operation.blocks(operation.args.src, source, _BYTES, _in_bytes(send_counts, source))
    operation.blocks(operation.args.dst, out, _BYTES, _in_bytes(recv_counts, out))
    return operation


def broadcast(buffer: Array, root: int) -> Operation:
    """Copy the root's `buffer` into `buffer` on every rank."""
    operation = Operation.make(abi.CollType.BROADCAST, root=root)
    operation.whole(operation.args.src, buffer, _BYTES, buffer.nbytes)
    return operation


def gather(block: Array, out: Array | None, counts: Sequence[int], root: int) -> Operation:
    """Collect every rank's block in `out` at the root; the root's block is in its place."""
    flags = _WIDE if out is None else _WIDE | abi.ArgsFlag.IN_PLACE
    operation = Operation.make(abi.CollType.GATHER_V, flags, root)
    if out is None:
        operation.whole(operation.args.src, block, _BYTES, block.nbytes)
    else:
        operation.blocks(operation.args.dst, out, _BYTES, _in_bytes(counts, out))
    return operation


def scatter(block: Array, source: Array | None, counts: Sequence[int], root: int) -> Operation:
    """Fill `block` with this rank's block of the root's `source`, except on the root itself."""
    flags = _WIDE if source is None else _WIDE | abi.ArgsFlag.IN_PLACE
    operation = Operation.make(abi.CollType.SCATTER_V, flags, root)
    if source is None:
        operation.whole(operation.args.dst, block, _BYTES, block.nbytes)
    else:
        operation.blocks(operation.args.src, source, _BYTES, _in_bytes(counts, source))
    return operation


def all_reduce(buffer: Array, native: UccReduction) -> Operation:
    """Reduce `buffer` in place on all ranks."""
    operation = Operation.make(abi.CollType.ALL_REDUCE, abi.ArgsFlag.IN_PLACE)
    operation.args.op = native.op
    operation.whole(operation.args.dst, buffer, native.datatype, buffer.size)
    return operation


def reduce(buffer: Array, native: UccReduction, root: int, rank: int) -> Operation:
    """Reduce `buffer` in place at the root."""
    flags = abi.ArgsFlag.IN_PLACE if rank == root else 0
    operation = Operation.make(abi.CollType.REDUCE, flags, root)
    operation.args.op = native.op
    side = operation.args.dst if rank == root else operation.args.src
    operation.whole(side, buffer, native.datatype, buffer.size)
    return operation


def reduce_scatter(source: Array, out: Array, counts: Sequence[int], native: UccReduction) -> Operation:
    """Reduce `source`, and put this rank's block into `out`."""
    operation = Operation.make(abi.CollType.REDUCE_SCATTER_V, _WIDE)
    operation.args.op = native.op
    operation.whole(operation.args.src, source, native.datatype, source.size)
    operation.blocks(operation.args.dst, out, native.datatype, counts)
    return operation


def _in_bytes(counts: Sequence[int], buffer: Array) -> list[int]:
    size = buffer.itemsize
    return [count * size for count in counts]


def _address(buffer: Array) -> int:
    address: int = buffer.__array_interface__["data"][0]
    return address
