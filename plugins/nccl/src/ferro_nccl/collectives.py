"""Collectives as NCCL calls on addresses: one call, or a group of calls where NCCL has no such collective.

    collective                   calls
    all_reduce, reduce,          one
      broadcast
    all_gather, reduce_scatter   one; with uneven blocks a group of one broadcast or reduce a block
    gather, scatter, all_to_all  a group of sends and receives; a rank's own block is copied
    send, recv, exchange         a group of sends and receives

Calls without elements are left out, because NCCL ignores them; all ranks leave out the same calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from ferro_nccl.codes import BYTE, NativeReduction
from ferro_nccl.library import Communicator, Gpu, GpuStream, NcclLibrary


class Span(NamedTuple):
    """A piece of memory: its address and its size in bytes."""

    address: int
    nbytes: int


def adjacent_spans(address: int, sizes: Sequence[int]) -> list[Span]:
    """List adjacent spans of these sizes in bytes, from an address on."""
    starts = accumulate(sizes, initial=address)
    return [Span(start, size) for start, size in zip(starts, sizes, strict=False)]


def split_span(whole: Span, counts: Sequence[int], itemsize: int) -> list[Span]:
    """Split a span into blocks of `counts` elements."""
    return adjacent_spans(whole.address, [count * itemsize for count in counts])


class StreamCollectives:
    """Launches the collectives of one communicator on one stream.

    Args:
        library: CuPy and NCCL.
        gpu: this rank's GPU.
        communicator: this rank's end of the communicator.
        stream: the stream.
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(
        self, library: NcclLibrary, gpu: Gpu, communicator: Communicator, stream: GpuStream, rank: int, world_size: int
    ) -> None:
        self._grouped = library.grouped
        self._gpu = gpu
        self._communicator = communicator
        self._stream = stream
        self._rank = rank
        self._world_size = world_size

    def all_reduce(self, buffer: int, count: int, native: NativeReduction) -> None:
        """Reduce `count` elements in place, on all ranks."""
        if count:
            self._communicator.all_reduce(
                buffer, buffer, count * native.width, native.dtype, native.op, self._stream.ptr
            )

    def reduce(self, buffer: int, count: int, native: NativeReduction, root: int) -> None:
        """Reduce `count` elements in place, at the root."""
        if count:
            self._communicator.reduce(
                buffer, buffer, count * native.width, native.dtype, native.op, root, self._stream.ptr
            )

    def broadcast(self, buffer: Span, root: int) -> None:
        """Fill the span with the root's bytes."""
        if buffer.nbytes:
            self._communicator.broadcast(buffer.address, buffer.address, buffer.nbytes, BYTE, root, self._stream.ptr)

    def all_gather(self, blocks: Sequence[Span]) -> None:
        """Fill adjacent spans, each with the bytes of its rank."""
        mine = blocks[self._rank]
        if all(block.nbytes == mine.nbytes for block in blocks):
            if mine.nbytes:
                self._communicator.all_gather(mine.address, blocks[0].address, mine.nbytes, BYTE, self._stream.ptr)
            return
        with self._grouped():
            for root, block in enumerate(blocks):
                self.broadcast(block, root)

    def reduce_scatter(
        self, source: int, target: int, counts: Sequence[int], itemsize: int, native: NativeReduction
    ) -> None:
        """Reduce adjacent blocks of `counts` elements; put this rank's into `target`."""
        if len(set(counts)) == 1:
            if counts[0]:
                self._communicator.reduce_scatter(
                    source, target, counts[0] * native.width, native.dtype, native.op, self._stream.ptr
                )
            return
        blocks = adjacent_spans(source, [count * itemsize for count in counts])
        with self._grouped():
            for root, (count, block) in enumerate(zip(counts, blocks, strict=True)):
                if not count:
                    continue
                # NCCL wants an address also on ranks other than the root, and does not write there.
                output = target if root == self._rank else block.address
                self._communicator.reduce(
                    block.address, output, count * native.width, native.dtype, native.op, root, self._stream.ptr
                )

    def exchange(self, sends: Sequence[tuple[int, Span]], recvs: Sequence[tuple[int, Span]]) -> None:
        """Run all these (peer, span) transfers at the same time; a transfer to this rank itself is a copy."""
        outgoing = [item for item in sends if item[0] != self._rank and item[1].nbytes]
        incoming = [item for item in recvs if item[0] != self._rank and item[1].nbytes]
        if outgoing or incoming:
            with self._grouped():
                for peer, span in outgoing:
                    self._communicator.send(span.address, span.nbytes, BYTE, peer, self._stream.ptr)
                for peer, span in incoming:
                    self._communicator.recv(span.address, span.nbytes, BYTE, peer, self._stream.ptr)
        local_sources = [span for peer, span in sends if peer == self._rank]
        local_targets = [span for peer, span in recvs if peer == self._rank]
        for source, target in zip(local_sources, local_targets, strict=True):
            self.copy(target, source)

    def all_to_all(self, outgoing: Sequence[Span], incoming: Sequence[Span]) -> None:
        """Send a span to every rank and fill one from every rank."""
        self.exchange([*enumerate(outgoing)], [*enumerate(incoming)])

    def copy(self, target: Span, source: Span) -> None:
        """Copy within this rank, unless source and target are the same memory."""
        if source.nbytes and source.address != target.address:
            self._gpu.copy(target.address, source.address, source.nbytes, self._stream)
