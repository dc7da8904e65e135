"""SequenceParallelLayerNorm: LayerNorm of sequences whose positions are divided over the ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, Work

from ..nn.arrays import Array
from ..nn.layernorm import LayerNorm
from ..nn.module import Module
from .conversion import check_serial_layer, replicated_copy


class SequenceParallelLayerNorm(LayerNorm):
    """Normalise this rank's positions; gradients of weight and bias are those of all positions.

    Each position is normalised by itself, so the forward pass is that of LayerNorm. In the
    backward pass the gradients of weight and bias are summed over the ranks, while the gradient
    of the input is computed: they are complete, and equal on all ranks, when the pullback returns.

    Args:
        normalized_shape: see LayerNorm.
        group: the ranks that have the other positions.
        eps: see LayerNorm.
        dtype: see LayerNorm.
    """

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        group: ProcessGroup,
        eps: float = 1e-5,
        *,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        super().__init__(normalized_shape, eps, dtype=dtype)
        self.group = group

    @classmethod
    def from_serial(cls, layer: Module, group: ProcessGroup) -> SequenceParallelLayerNorm:
        """Copy a LayerNorm that all ranks have; all call it.

        Raises:
            UsageError: `layer` is no LayerNorm, or differs between ranks.
        """
        whole = check_serial_layer(cls, layer, LayerNorm, group, {})
        made = cls(whole.normalized_shape, group, whole.eps)
        made.weight = None if whole.weight is None else replicated_copy(whole.weight)
        made.bias = None if whole.bias is None else replicated_copy(whole.bias)
        made.training = whole.training
        return made

    def _sum_over_positions(self, sums: Array) -> Callable[[], Array]:
        summed: Work[Array] = self.group.all_reduce(sums, out=sums, async_op=True)
        return summed.wait

    def __repr__(self) -> str:
        shape = self.normalized_shape
        return f"SequenceParallelLayerNorm({shape}, {self.group!r}, eps={self.eps})"
