"""FlatLayout: the positions of parameters in one flat array, and its division into shards.

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
class ParameterSpan:
    """The position of one parameter in the flat array.

    Attributes:
        name: the parameter's qualified name.
        shape: its unsharded shape.
        start: the index of its first element.
        stop: the index after its last element.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatLayout:
    """Parameters one after the other, padded, divided into equal shards.

    Attributes:
        spans: the positions of the parameters.
        num_shards: number of shards.
        shard_size: elements in each shard.
    """

    spans: tuple[ParameterSpan, ...]
    num_shards: int
    shard_size: int

    @property
    def unpadded_size(self) -> int:
        """Elements before the padding."""
        return self.spans[-1].stop

    @property
    def size(self) -> int:
        """Elements including the padding."""
        return self.num_shards * self.shard_size

    def shard_slice(self, rank: int) -> slice:
        """Locate a rank's shard in the flat array."""
        return slice(rank * self.shard_size, (rank + 1) * self.shard_size)

    def slice_in_parameter(self, span: ParameterSpan, rank: int) -> slice:
        """Locate a rank's shard in one flattened parameter; the slice may be empty."""
        shard, size = self.shard_slice(rank), span.stop - span.start
        start = min(max(shard.start - span.start, 0), size)
        return slice(start, max(start, min(shard.stop - span.start, size)))

    def slice_in_shard(self, span: ParameterSpan, rank: int) -> slice:
        """Locate a parameter in a rank's shard; the slice may be empty."""
        part = self.slice_in_parameter(span, rank)
        start = min(max(span.start - rank * self.shard_size, 0), self.shard_size)
        return slice(start, start + part.stop - part.start)

    def views(self, flat: Array) -> list[Array]:
        """View a flat array as one array per parameter, in the parameters' shapes."""
        return [flat[s.start : s.stop].reshape(s.shape) for s in self.spans]

    def shard_sizes(self, span: ParameterSpan) -> list[int]:
        """Count the elements of a parameter on each rank."""
        parts = [self.slice_in_parameter(span, rank) for rank in range(self.num_shards)]
        return [part.stop - part.start for part in parts]


def flat_layout(shapes: Iterable[tuple[str, tuple[int, ...]]], num_shards: int) -> FlatLayout:
    """Lay out at least one parameter, each given as (name, shape)."""
    spans, start = [], 0
    for name, shape in shapes:
        stop = start + math.prod(shape)
        spans.append(ParameterSpan(name=name, shape=shape, start=start, stop=stop))
        start = stop
    return FlatLayout(spans=tuple(spans), num_shards=num_shards, shard_size=-(-start // num_shards))
