"""Layout: where parameters lie in one flat array, and where ranks cut it.

Parameters a, b and c of 3, 4 and 3 elements on 4 ranks; "." is padding:

    flat    a a a b b b b c c c . .
    rank    0 0 0 1 1 1 2 2 2 3 3 3
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..nn.arrays import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a parameter lies in the flat array.

    Attributes:
        name: the parameter's qualified name.
        shape: its shape, when whole.
        start: of its first element.
        stop: behind its last element.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Parameters one after the other, padded, cut into equal shards.

    Attributes:
        places: of the parameters.
        ranks: number of shards.
        shard_size: elements in each.
    """

    places: tuple[Place, ...]
    ranks: int
    shard_size: int

    @property
    def used(self) -> int:
        """Elements in front of the padding."""
        return self.places[-1].stop

    @property
    def size(self) -> int:
        """Elements altogether."""
        return self.ranks * self.shard_size

    def shard(self, rank: int) -> slice:
        """Return the part of the flat array that is a rank's shard."""
        return slice(rank * self.shard_size, (rank + 1) * self.shard_size)

    def part(self, place: Place, rank: int) -> slice:
        """Return the part of a flattened parameter that lies in a rank's shard; perhaps empty."""
        shard, size = self.shard(rank), place.stop - place.start
        start = min(max(shard.start - place.start, 0), size)
        return slice(start, max(start, min(shard.stop - place.start, size)))

    def within(self, place: Place, rank: int) -> slice:
        """Return the part of a rank's shard that belongs to a parameter; perhaps empty."""
        part = self.part(place, rank)
        start = min(max(place.start - rank * self.shard_size, 0), self.shard_size)
        return slice(start, start + part.stop - part.start)

    def cut(self, whole: Array) -> list[Array]:
        """Return views of a flat array, one for each parameter, in its shape."""
        return [whole[p.start : p.stop].reshape(p.shape) for p in self.places]

    def sizes(self, place: Place) -> list[int]:
        """Return how many elements of a parameter each rank has."""
        parts = [self.part(place, rank) for rank in range(self.ranks)]
        return [part.stop - part.start for part in parts]


def lay_out(shapes: Iterable[tuple[str, tuple[int, ...]]], ranks: int) -> Layout:
    """Place parameters, given as (name, shape), at least one, for so many ranks."""
    places, start = [], 0
    for name, shape in shapes:
        stop = start + math.prod(shape)
        places.append(Place(name=name, shape=shape, start=start, stop=stop))
        start = stop
    return Layout(places=tuple(places), ranks=ranks, shard_size=-(-start // ranks))
