"""UnshardedGradient: the gradients of a flat parameter on this rank, before they are reduced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..nn.arrays import Array
from ..nn.parameter import Parameter
from .buffer_pool import PooledBuffer
from .layout import FlatLayout


class UnshardedGradient:
    """One flat array of gradients, accumulated by this rank alone.

    Args:
        parameters: the parameters.
        layout: their positions in the flat array.
        allocate: returns memory for all of them, in single precision at least, because many microbatches add up in it.
        keeps_memory: whether the memory is kept after `take`.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        layout: FlatLayout,
        allocate: Callable[[], PooledBuffer],
        *,
        keeps_memory: bool,
    ) -> None:
        self._parameters = parameters
        self._layout = layout
        self._allocate = allocate
        self._keeps_memory = keeps_memory
        self._buffer: PooledBuffer | None = None
        self._is_set = [False] * len(parameters)
        self._times_zeroed = [0] * len(parameters)

    @property
    def has_any(self) -> bool:
        """True if there is a gradient to be reduced."""
        return any(self.present)

    @property
    def present(self) -> list[bool]:
        """For each parameter, whether it has a gradient here that `zero_grad` has not cleared since."""
        return [
            is_set and parameter.times_zeroed == times
            for parameter, is_set, times in zip(self._parameters, self._is_set, self._times_zeroed, strict=True)
        ]

    def views(self) -> list[tuple[Array, Array | None]]:
        """Return for each parameter the memory of its gradient, and the gradient or None."""
        if self._buffer is None:
            self._buffer = self._allocate()
        memory = self._layout.views(self._buffer.array)
        return [(view, view if is_set else None) for view, is_set in zip(memory, self.present, strict=True)]

    def mark_if_set(self, index: int) -> None:
        """Record whether a parameter, which views this memory now, has a gradient."""
        parameter = self._parameters[index]
        self._is_set[index] = parameter.grad is not None
        self._times_zeroed[index] = parameter.times_zeroed

    def defer(self, index: int, products: Sequence[Callable[[], None]]) -> list[partial[None]]:
        """Wrap deferred products so that they can be added outside passes."""
        return [partial(self._add, index, product) for product in products]

    def scale(self, factor: float) -> None:
        """Multiply all gradients by a factor."""
        if self._buffer is not None:
            for view, is_set in zip(self._layout.views(self._buffer.array), self._is_set, strict=True):
                if is_set:
                    view *= view.dtype.type(factor)

    def take(self) -> PooledBuffer:
        """Return all gradients, with zeros for absent ones, and start again without gradients."""
        if self._buffer is None:
            self._buffer = self._allocate()
        taken = self._buffer
        taken.array[self._layout.unpadded_size :] = 0
        for span, is_set in zip(self._layout.spans, self.present, strict=True):
            if not is_set:
                taken.array[span.start : span.stop] = 0
        self._is_set = [False] * len(self._parameters)
        if not self._keeps_memory:
            self._buffer = None
        return taken

    def still_uses(self, taken: PooledBuffer) -> bool:
        """Return True if further gradients will be added in the memory that `take` returned."""
        return taken is self._buffer

    def clear(self) -> None:
        """Forget all gradients."""
        self._buffer = None
        self._is_set = [False] * len(self._parameters)

    def _add(self, index: int, product: Callable[[], None]) -> None:
        parameter = self._parameters[index]
        shard, shard_grad = parameter.data, parameter.grad
        view, grad = self.views()[index]
        # A product needs only the size and dtype of the value, which its gradient has as well.
        parameter.hold(view, grad=grad, grad_memory=view)
        try:
            product()
            self.mark_if_set(index)
        finally:
            parameter.hold(shard, grad=shard_grad, grad_memory=shard_grad)
