"""Regions: how activations enter a part of the model where ranks differ, and leave it.

Each is the adjoint of another, so that gradients of what is whole are whole, and equal, again.

| module     | forward            | backward           | adjoint of | in the papers           |
|------------|--------------------|--------------------|------------|-------------------------|
| CopyIn     | nothing            | all_reduce         | ReduceOut  | f                       |
| ReduceOut  | all_reduce         | nothing            | CopyIn     | g (2019), f-bar (2022)  |
| GatherIn   | all_gather         | reduce_scatter     | ScatterOut | g (2022)                |
| ScatterOut | reduce_scatter     | all_gather         | GatherIn   | g-bar (2022)            |
| SplitIn    | keep the own piece | all_gather         | GatherOut  |                         |
| GatherOut  | all_gather         | keep the own piece | SplitIn    |                         |

The names are those of a region's ends: after CopyIn and GatherIn every rank computes a part of
what is made of the same input, and before ReduceOut and ScatterOut its part of a sum. SplitIn
and GatherOut stand where each element is made by one rank alone. The layers of this package
contain their own ends; these are for what stands between them, and for layers of your own.

Source: Shoeybi et al., "Megatron-LM", 2019, section 3; Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models", 2022, section 4.2.2.
"""

from __future__ import annotations

from ferro import ProcessGroup

from ..nn.arrays import Array
from ..nn.checks import check_input
from ..nn.module import Module, Pullback
from ..parts import even_sizes
from .cuts import everyones_sizes, gather_along, reduce_scatter_along, take_piece


class _Region(Module):
    """One end of a region; `dim` is that along which pieces are cut, dim 1 that of sequences."""

    def __init__(self, group: ProcessGroup, dim: int = 1) -> None:
        self.group = group
        self.dim = dim

    def _check(self, x: Array) -> None:
        least = self.dim + 1 if self.dim >= 0 else -self.dim
        check_input(self, x, f"of at least {least} dimensions", fits=x.ndim >= least)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.group!r}, dim={self.dim})"


class CopyIn(Module):
    """The same x on every rank; the gradient is the sum of the ranks' gradients."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Pass `x` on."""

        def pullback(grad_y: Array) -> Array:
            grad_x: Array = self.group.all_reduce(grad_y)
            return grad_x

        return x, pullback

    def __repr__(self) -> str:
        return f"CopyIn({self.group!r})"


class ReduceOut(Module):
    """The sum of the ranks' x; every rank's gradient is that of the sum."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Sum `x`, of one shape on all ranks."""
        return self.group.all_reduce(x), lambda grad_y: grad_y

    def __repr__(self) -> str:
        return f"ReduceOut({self.group!r})"


class GatherIn(_Region):
    """The ranks' pieces together; the gradient is summed, and each rank gets its piece."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Concatenate pieces of any size along `dim`."""
        self._check(x)
        group, dim = self.group, self.dim
        sizes = everyones_sizes(x.shape[dim], group, x)
        y = gather_along(x, group, dim, sizes)
        return y, lambda grad_y: reduce_scatter_along(grad_y, group, dim, sizes)


class ScatterOut(_Region):
    """This rank's piece of the sum of the ranks' x; gradients of the pieces are put together."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Sum `x`, of one shape on all ranks, and cut `dim` as numpy.array_split does."""
        self._check(x)
        group, dim = self.group, self.dim
        sizes = even_sizes(x.shape[dim], group.world_size)
        y = reduce_scatter_along(x, group, dim, sizes)
        return y, lambda grad_y: gather_along(grad_y, group, dim, sizes)


class SplitIn(_Region):
    """This rank's piece of an x that all have; gradients of the pieces are put together."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Cut `dim` as numpy.array_split does."""
        self._check(x)
        group, dim = self.group, self.dim
        sizes = even_sizes(x.shape[dim], group.world_size)
        y = take_piece(x, group, dim, sizes)
        return y, lambda grad_y: gather_along(grad_y, group, dim, sizes)


class GatherOut(_Region):
    """The ranks' pieces together; of a gradient that all have, each rank gets its piece."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Concatenate pieces of any size along `dim`."""
        self._check(x)
        group, dim = self.group, self.dim
        sizes = everyones_sizes(x.shape[dim], group, x)
        y = gather_along(x, group, dim, sizes)
        return y, lambda grad_y: take_piece(grad_y, group, dim, sizes)
