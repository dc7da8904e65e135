"""Modules for the beginning and the end of a tensor-parallel or sequence-parallel region.

Each module is the adjoint of another one, so an activation that is the same on all ranks has a gradient that is the
same on all ranks.

| module     | forward            | backward           | adjoint of | in the papers           |
|------------|--------------------|--------------------|------------|-------------------------|
| CopyIn     | nothing            | all_reduce         | ReduceOut  | f                       |
| ReduceOut  | all_reduce         | nothing            | CopyIn     | g (2019), f-bar (2022)  |
| GatherIn   | all_gather         | reduce_scatter     | ScatterOut | g (2022)                |
| ScatterOut | reduce_scatter     | all_gather         | GatherIn   | g-bar (2022)            |
| SplitIn    | keep the own shard | all_gather         | GatherOut  |                         |
| GatherOut  | all_gather         | keep the own shard | SplitIn    |                         |

Names end in In at the beginning of a region, in Out at its end. After CopyIn and GatherIn each rank computes its part
of the results from the same input; before ReduceOut and ScatterOut it computes its part of a sum. SplitIn and GatherOut
belong where one rank alone computes each element. The layers of this package need none of these modules; they are for
code between the layers, and for layers of your own.

Source: Shoeybi et al., "Megatron-LM", 2019, section 3; Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models", 2022, section 4.2.2.
"""

from __future__ import annotations

from ferro import ProcessGroup
from ferro.collectives.partition import even_sizes

from ..nn.arrays import Array
from ..nn.checks import check_input, checked_pullback
from ..nn.module import Module, Pullback
from .sharding import all_gather_along, all_gather_sizes, local_shard, reduce_scatter_along


class _ShardingRegion(Module):
    """One end of a region; activations are sharded along `dim`, by default that of sequences."""

    def __init__(self, group: ProcessGroup, dim: int = 1) -> None:
        self.group = group
        self.dim = dim

    def _check(self, x: Array) -> None:
        least = self.dim + 1 if self.dim >= 0 else -self.dim
        check_input(self, x, f"of at least {least} dimensions", fits=x.ndim >= least)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.group!r}, dim={self.dim})"


class CopyIn(Module):
    """Return an x that all ranks have; its gradient is the sum of the ranks' gradients."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Return `x` unchanged."""

        def pullback(grad_y: Array) -> Array:
            grad_x: Array = self.group.all_reduce(grad_y)
            return grad_x

        return x, checked_pullback(self, x.shape, pullback)

    def __repr__(self) -> str:
        return f"CopyIn({self.group!r})"


class ReduceOut(Module):
    """Sum the ranks' x; every rank's gradient is the gradient of the sum."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Sum `x`, of one shape on all ranks."""
        return self.group.all_reduce(x), checked_pullback(self, x.shape, lambda grad_y: grad_y)

    def __repr__(self) -> str:
        return f"ReduceOut({self.group!r})"


class GatherIn(_ShardingRegion):
    """Gather the ranks' shards; their gradients are summed and scattered."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Concatenate shards of any size along `dim`."""
        self._check(x)
        group, dim = self.group, self.dim
        sizes = all_gather_sizes(x.shape[dim], group, x)
        y = all_gather_along(x, group, dim, sizes)
        return y, checked_pullback(self, y.shape, lambda grad_y: reduce_scatter_along(grad_y, group, dim, sizes))


class ScatterOut(_ShardingRegion):
    """Sum the ranks' x and scatter the sum; the gradients of the shards are gathered."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Sum `x`, of one shape on all ranks, and divide `dim` as numpy.array_split does."""
        self._check(x)
        group, dim = self.group, self.dim
        sizes = even_sizes(x.shape[dim], group.world_size)
        y = reduce_scatter_along(x, group, dim, sizes)
        return y, checked_pullback(self, y.shape, lambda grad_y: all_gather_along(grad_y, group, dim, sizes))


class SplitIn(_ShardingRegion):
    """Keep this rank's shard of an x that all have; the gradients of the shards are gathered."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Divide `dim` as numpy.array_split does."""
        self._check(x)
        group, dim = self.group, self.dim
        sizes = even_sizes(x.shape[dim], group.world_size)
        y = local_shard(x, group, dim, sizes)
        return y, checked_pullback(self, y.shape, lambda grad_y: all_gather_along(grad_y, group, dim, sizes))


class GatherOut(_ShardingRegion):
    """Gather the ranks' shards; each rank keeps its shard of a gradient that all have."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Concatenate shards of any size along `dim`."""
        self._check(x)
        group, dim = self.group, self.dim
        sizes = all_gather_sizes(x.shape[dim], group, x)
        y = all_gather_along(x, group, dim, sizes)
        return y, checked_pullback(self, y.shape, lambda grad_y: local_shard(grad_y, group, dim, sizes))
