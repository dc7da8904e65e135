"""SequenceParallelLayerNorm: LayerNorm where each rank has some positions of the sequences."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, Work

from ..nn.arrays import Array, namespace_of
from ..nn.checks import check_dtype, check_input
from ..nn.layernorm import LayerNorm
from ..nn.module import Module, Pullback
from .pieces import check_layer, replica_of


class SequenceParallelLayerNorm(LayerNorm):
    """LayerNorm of this rank's positions; gradients of weight and bias are those of all.

    Each position is normalised by itself, so the forward pass is that of LayerNorm. In the
    backward pass the gradients of weight and bias are summed over the ranks, while that of the
    input is computed: they are complete, and equal on all ranks, when the pullback returns.

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
        self._shape = self.weight.data.shape
        self.group = group

    @classmethod
    def from_serial(cls, layer: Module, group: ProcessGroup) -> SequenceParallelLayerNorm:
        """Copy a LayerNorm that all ranks have; all call it.

        Raises:
            UsageError: it is no LayerNorm, or differs between ranks.
        """
        whole = check_layer(cls, layer, LayerNorm, group, {})
        made = cls(whole.weight.data.shape, group, whole.eps, dtype=whole.weight.data.dtype)
        made.weight, made.bias = replica_of(whole.weight), replica_of(whole.bias)
        made.training = whole.training
        return made

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Normalise (..., *normalized_shape)."""
        shape = self._shape
        check_dtype(self, x, self.weight.data.dtype)
        expected = f"(..., {', '.join(map(str, shape))})"
        check_input(self, x, expected, fits=x.shape[-len(shape) :] == shape)
        xp, group = namespace_of(x), self.group
        weight, bias = self.weight.use(), self.bias.use()
        size = math.prod(shape)
        x_shape, rows = x.shape, x.reshape(x.size // size, size)
        xhat = rows - rows.mean(axis=1, keepdims=True)
        var = xp.einsum("nd,nd->n", xhat, xhat) / size
        inverse = (1 / xp.sqrt(var + self.eps))[:, None]
        xhat *= inverse
        y = xhat * weight.data.reshape(size)
        y += bias.data.reshape(size)

        def pullback(grad_y: Array) -> Array:
            grad = grad_y.reshape(xhat.shape)
            sums = xp.stack((xp.einsum("nd,nd->d", grad, xhat), grad.sum(axis=0)))
            summed: Work[Array] = group.all_reduce(sums, out=sums, async_op=True)
            grad = grad * weight.data.reshape(size)
            grad_x: Array = xhat * (xp.einsum("nd,nd->n", grad, xhat) / -size)[:, None]
            grad_x += grad
            grad_x -= grad.mean(axis=1, keepdims=True)
            grad_x *= inverse
            grad_weight, grad_bias = summed.wait()
            bias.add_grad(grad_bias.reshape(shape))
            weight.add_grad(grad_weight.reshape(shape))
            return grad_x.reshape(x_shape)

        return y.reshape(x_shape), pullback

    def __repr__(self) -> str:
        return f"SequenceParallelLayerNorm({self._shape}, {self.group!r}, eps={self.eps})"
