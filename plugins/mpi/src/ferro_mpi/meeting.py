"""Reductions that need all contributions at once: they meet by MPI, NumPy combines them in order.

A small call gathers everything everywhere (or at the root). In a large one each rank combines one
block of a piece, so that memory for all contributions is as large as the piece:

    piece of all ranks' buffers     rank 0   | a0 | a1 | a2 |
                                    rank 1   | b0 | b1 | b2 |      all_to_all: rank 1 gets a1 b1 c1
                                    rank 2   | c0 | c1 | c2 |      all_gather of the combined blocks

Between two steps NumPy, or a function of the user's, can fail on one rank only; so the steps do not
block: the others are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TypeAlias

import numpy as np

from ferro.collectives.partition import near_equal
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_mpi.arithmetic import movable
from ferro_mpi.mpi import MPI

SMALL_BYTES = 256 << 10  # of all contributions together
_PIECE_BYTES = 8 << 20

# Waits for a request that uses buffers: (request, buffers).
Finish: TypeAlias = Callable[[MPI.Request, object], None]
# A buffer, sizes of its blocks and where they begin.
Blocks: TypeAlias = tuple[Array, tuple[Sequence[int], Sequence[int]]]


def all_reduce(comm: MPI.Intracomm, buffer: Array, reduction: Reduction, finish: Finish) -> None:
    """Reduce `buffer` over all ranks, in place, on all ranks."""
    n = comm.Get_size()
    if n * buffer.nbytes <= SMALL_BYTES:
        parts = np.empty(n * buffer.size, buffer.dtype)
        finish(comm.Iallgather(movable(buffer), movable(parts)), (buffer, parts))
        reduction.into(buffer, near_equal(parts, n), at_once=True)
        return
    for piece in _pieces(buffer):
        own = near_equal(piece, n)
        counts = [block.size for block in own]
        reduce_scatter(comm, piece, own[comm.Get_rank()], counts, reduction, finish)
        blocks = in_blocks(piece, counts)
        finish(comm.Iallgatherv(MPI.IN_PLACE, blocks), piece)


def reduce(
    comm: MPI.Intracomm, buffer: Array, reduction: Reduction, root: int, finish: Finish
) -> None:
    """Reduce `buffer` over all ranks, in place at `root`."""
    n, at_root = comm.Get_size(), comm.Get_rank() == root
    for piece in _pieces(buffer):
        parts = np.empty(n * piece.size if at_root else 0, buffer.dtype)
        taken = movable(parts) if at_root else None
        finish(comm.Igather(movable(piece), taken, root), (piece, parts))
        if at_root:
            reduction.into(piece, near_equal(parts, n), at_once=True)


def reduce_scatter(
    comm: MPI.Intracomm,
    source: Array,
    out: Array,
    counts: Sequence[int],
    reduction: Reduction,
    finish: Finish,
) -> None:
    """Reduce `source`, block by block of `counts` elements; put this rank's block into `out`.

    `out` may be this rank's block of `source` itself.
    """
    n = comm.Get_size()
    parts = np.empty(n * out.size, source.dtype)
    sent, taken = in_blocks(source, counts), in_blocks(parts, [out.size] * n)
    finish(comm.Ialltoallv(sent, taken), (source, parts))
    reduction.into(out, near_equal(parts, n), at_once=True)


def in_blocks(buffer: Array, counts: Sequence[int]) -> Blocks:
    """Return a buffer as mpi4py takes one in blocks of `counts` elements."""
    return movable(buffer), (counts, [0, *accumulate(counts)][:-1])


def _pieces(buffer: Array) -> Iterator[Array]:
    """Cut a buffer into pieces of bounded size; at least one, be it empty."""
    length = _PIECE_BYTES // buffer.itemsize
    for start in range(0, max(1, buffer.size), length):
        yield buffer[start : start + length]
