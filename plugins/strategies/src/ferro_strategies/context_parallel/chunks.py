"""SequenceChunks: the division of a sequence's positions over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ferro.collectives.partition import even_sizes

from ..nn.arrays import Array


@dataclass(frozen=True, slots=True)
class SequenceChunks:
    """Chunks of consecutive positions, and the ranks that have them.

    With causal attention later positions attend to more keys. So a sequence is cut into two chunks for each rank, and
    each has one from either end, which makes the work of all ranks alike ("zigzag"). For three ranks:

        chunk   0  1  2  3  4  5
        rank    0  1  2  2  1  0

    Without zigzag each rank has one chunk. Chunks differ in length by at most 1 and may be empty.

    Attributes:
        length: of the whole sequence.
        world_size: number of ranks.
        zigzag: whether each rank has two chunks.

    Source: the zigzag is from Zhu, "ring-flash-attention", 2024, and Llama 3's ("The Llama 3 Herd of Models", 2024,
    section 3.3.2).
    """

    length: int
    world_size: int
    zigzag: bool = True

    def spans(self, rank: int) -> tuple[tuple[int, int], ...]:
        """The first position of each chunk of a rank and the one after its last, in the order in which it has them."""
        count = 2 * self.world_size if self.zigzag else self.world_size
        ends = (0, *accumulate(even_sizes(self.length, count)))
        chunks = (rank, count - 1 - rank) if self.zigzag else (rank,)
        return tuple((ends[chunk], ends[chunk + 1]) for chunk in chunks)

    def size(self, rank: int) -> int:
        """The number of positions of a rank."""
        return sum(stop - start for start, stop in self.spans(rank))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of positions of each rank."""
        return tuple(map(self.size, range(self.world_size)))

    def positions(self, rank: int) -> Array:
        """The positions of a rank, in its order."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.spans(rank)])

    def order(self) -> Array:
        """Indices that put the ranks' positions, one rank after the other, into the order of the sequence."""
        return np.argsort(np.concatenate([self.positions(rank) for rank in range(self.world_size)]))
