"""Moves: collectives as calls of NCCL, on addresses; what it has no call for, as a group of some.

    collective                   calls
    all_reduce, reduce,          one
      broadcast
    all_gather, reduce_scatter   one; with uneven blocks a group of one broadcast or reduce a block
    gather, scatter, all_to_all  a group of sends and receives; a rank's own block is copied
    send, recv, exchange         a group of sends and receives

NCCL drops calls of no elements, and on all ranks alike: so they are left out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from ferro_nccl.codes import BYTE, Native
from ferro_nccl.library import Communicator, Gpu, Library, Stream


class Span(NamedTuple):
    """A piece of memory: where it begins and its size in bytes."""

    address: int
    nbytes: int


def spans(address: int, sizes: Sequence[int]) -> list[Span]:
    """Return adjacent spans of these sizes in bytes."""
    starts = accumulate(sizes, initial=address)
    return [Span(start, size) for start, size in zip(starts, sizes, strict=False)]


def cut(whole: Span, counts: Sequence[int], itemsize: int) -> list[Span]:
    """Return the blocks of `counts` elements in a span."""
    return spans(whole.address, [count * itemsize for count in counts])


class Moves:
    """The calls of one communicator, on one stream.

    Args:
        library: CuPy and NCCL.
        gpu: this rank's.
        communicator: this rank's end.
        stream: where they are launched.
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(
        self,
        library: Library,
        gpu: Gpu,
        communicator: Communicator,
        stream: Stream,
        rank: int,
        world_size: int,
    ) -> None:
        self._grouped = library.grouped
        self._gpu = gpu
        self._communicator = communicator
        self._stream = stream
        self._rank = rank
        self._world_size = world_size

    def all_reduce(self, buffer: int, count: int, way: Native) -> None:
        """Reduce `count` elements in place, on all ranks."""
        if count:
            self._communicator.all_reduce(
                buffer, buffer, count * way.width, way.dtype, way.op, self._stream.ptr
            )

    def reduce(self, buffer: int, count: int, way: Native, root: int) -> None:
        """Reduce `count` elements in place, at the root."""
        if count:
            self._communicator.reduce(
                buffer, buffer, count * way.width, way.dtype, way.op, root, self._stream.ptr
            )

    def broadcast(self, buffer: Span, root: int) -> None:
        """Fill the span with the root's."""
        if buffer.nbytes:
            self._communicator.broadcast(
                buffer.address, buffer.address, buffer.nbytes, BYTE, root, self._stream.ptr
            )

    def all_gather(self, blocks: Sequence[Span]) -> None:
        """Fill adjacent spans, each with its rank's."""
        mine = blocks[self._rank]
        if all(block.nbytes == mine.nbytes for block in blocks):
            if mine.nbytes:
                self._communicator.all_gather(
                    mine.address, blocks[0].address, mine.nbytes, BYTE, self._stream.ptr
                )
            return
        with self._grouped():
            for root, block in enumerate(blocks):
                self.broadcast(block, root)

    def reduce_scatter(
        self, source: int, target: int, counts: Sequence[int], itemsize: int, way: Native
    ) -> None:
        """Reduce adjacent blocks of `counts` elements; put this rank's into `target`."""
        if len(set(counts)) == 1:
            if counts[0]:
                self._communicator.reduce_scatter(
                    source, target, counts[0] * way.width, way.dtype, way.op, self._stream.ptr
                )
            return
        blocks = spans(source, [count * itemsize for count in counts])
        with self._grouped():
            for root, (count, block) in enumerate(zip(counts, blocks, strict=True)):
                if not count:
                    continue
                # Away from the root the target is not written: NCCL only wants an address.
                into = target if root == self._rank else block.address
                self._communicator.reduce(
                    block.address,
                    into,
                    count * way.width,
                    way.dtype,
                    way.op,
                    root,
                    self._stream.ptr,
                )

    def exchange(
        self, sends: Sequence[tuple[int, Span]], recvs: Sequence[tuple[int, Span]]
    ) -> None:
        """Do all these (peer, span) transfers at the same time; what stays here is copied."""
        away = [item for item in sends if item[0] != self._rank and item[1].nbytes]
        coming = [item for item in recvs if item[0] != self._rank and item[1].nbytes]
        if away or coming:
            with self._grouped():
                for peer, span in away:
                    self._communicator.send(span.address, span.nbytes, BYTE, peer, self._stream.ptr)
                for peer, span in coming:
                    self._communicator.recv(span.address, span.nbytes, BYTE, peer, self._stream.ptr)
        staying = [span for peer, span in sends if peer == self._rank]
        arriving = [span for peer, span in recvs if peer == self._rank]
        for source, target in zip(staying, arriving, strict=True):
            self.copy(target, source)

    def all_to_all(self, outgoing: Sequence[Span], incoming: Sequence[Span]) -> None:
        """Send a span to every rank and fill one from every rank."""
        self.exchange([*enumerate(outgoing)], [*enumerate(incoming)])

    def copy(self, target: Span, source: Span) -> None:
        """Copy within this rank, unless it is there already."""
        if source.nbytes and source.address != target.address:
            self._gpu.copy(target.address, source.address, source.nbytes, self._stream)
