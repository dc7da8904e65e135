"""Multi-head self-attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

from .arrays import Array, Rng, matmul, namespace_of, wide_dtype
from .checks import check_input, check_positive
from .linear import Linear
from .module import Module, Pullback


class Attention(Module):
    """Multi-head self-attention: (B, T, dim) -> (B, T, dim).

    Each head has dim / num_heads columns of query, key and value, side by side:

        output(concatenate over heads of softmax(q @ k.T / sqrt(dim / num_heads)) @ v)

    The pullback keeps q, k, v, the heads' output, and the (B, num_heads, T, T) weights.

    Args:
        dim: size of the last dimension.
        num_heads: number of heads; a divisor of `dim`.
        causal: whether a position attends only to itself and the positions before it.
        bias: whether the four linear layers have biases.
        dtype: dtype of the parameters, the input and the output.
        rng: random generator or seed for the weights, drawn in the order of the attributes.

    Attributes:
        dim, num_heads, causal, bias: as given.
        query, key, value, output: each a Linear, dim -> dim.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = True,
        bias: bool = True,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        check_positive("Attention", dim=dim, num_heads=num_heads)
        if dim % num_heads:
            raise UsageError(f"Attention: dim must be a multiple of num_heads, got {dim} and {num_heads}.")
        self.dim = dim
        self.num_heads = num_heads
        self.causal = causal
        self.bias = bias
        draws = np.random.default_rng(rng)
        self.query = Linear(dim, dim, bias, dtype=dtype, rng=draws)
        self.key = Linear(dim, dim, bias, dtype=dtype, rng=draws)
        self.value = Linear(dim, dim, bias, dtype=dtype, rng=draws)
        self.output = Linear(dim, dim, bias, dtype=dtype, rng=draws)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (B, T, dim) to (B, T, dim), T at least 1."""
        fits = x.ndim == 3 and x.shape[1] > 0 and x.shape[2] == self.dim
        check_input(self, x, f"(B, T >= 1, {self.dim})", fits=fits)
        (query, pull_query), (key, pull_key), (value, pull_value) = (
            part.vjp(x) for part in (self.query, self.key, self.value)
        )
        mixed, pull_heads = attend(query, key, value, self.num_heads, causal=self.causal)
        y, pull_output = self.output.vjp(mixed)

        def pullback(grad_y: Array) -> Array:
            grad_x: Array | None = None
            grads = pull_heads(_gradient(pull_output(grad_y)))
            for pull, grad in zip((pull_query, pull_key, pull_value), grads, strict=True):
                part = _gradient(pull(grad))
                grad_x = part if grad_x is None else grad_x + part
            return _gradient(grad_x)

        return y, pullback

    def __repr__(self) -> str:
        return f"Attention({self.dim}, {self.num_heads}, causal={self.causal}, bias={self.bias})"


def attend(
    query: Array, key: Array, value: Array, num_heads: int, *, causal: bool
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Compute for each position and head the mean of the values, weighted by softmax(query @ key.T).

    This takes one array of size (B, num_heads, T, T), which the pullback keeps, and another one
    while the pullback runs. The softmax of half precision is computed in float32.

    Args:
        query: (B, T, columns), T at least 1; num_heads divides columns.
        key: of the same shape.
        value: of the same shape.
        num_heads: number of heads, which lie side by side in the columns.
        causal: whether a position attends only to itself and the positions before it.

    Returns:
        The heads' outputs side by side, (B, T, columns), in the memory layout of `query`; and a
        function from their gradient to the gradients of query, key and value.

    Source: the pullback's sums are from Dao et al., "FlashAttention", 2022, appendix B.2.
    """
    xp = namespace_of(query)
    scale = 1 / math.sqrt(query.shape[2] // num_heads)
    q = _heads(query * scale, num_heads)
    k, v = _heads(key, num_heads), _heads(value, num_heads)
    weights = _softmax_weights(xp, q, k, causal=causal)
    mixed = xp.empty_like(query)
    matmul(weights, v, out=_heads(mixed, num_heads))

    def pull(grad_mixed: Array) -> tuple[Array, Array, Array]:
        grad = _heads(grad_mixed, num_heads)
        grads = xp.empty_like(query), xp.empty_like(key), xp.empty_like(value)
        grad_q, grad_k, grad_v = (_heads(whole, num_heads) for whole in grads)
        matmul(weights.swapaxes(2, 3), grad, out=grad_v)
        # The gradient through softmax is weights * (d - sum(weights * d)), d being that of the
        # weights. The sum over keys equals the sum of grad * mixed over columns, which needs no
        # further array.
        grad_scores = matmul(grad, v.swapaxes(2, 3))
        wide = wide_dtype(grad.dtype)
        sums = xp.einsum("bhtc,bhtc->bht", grad, _heads(mixed, num_heads), dtype=wide)
        grad_scores -= sums.astype(grad.dtype, copy=False)[..., None]
        grad_scores *= weights
        matmul(grad_scores, k, out=grad_q)
        grad_q *= scale
        matmul(grad_scores.swapaxes(2, 3), q, out=grad_k)
        return grads

    return mixed, pull


def _heads(x: Array, num_heads: int) -> Array:
    """View (B, T, columns) as (B, num_heads, T, columns of a head)."""
    batch, length, columns = x.shape
    return x.reshape(batch, length, num_heads, columns // num_heads).transpose(0, 2, 1, 3)


def _softmax_weights(xp: ModuleType, q: Array, k: Array, *, causal: bool) -> Array:
    """Compute the softmax of q @ k.T over the keys to which a position may attend."""
    scores = matmul(q, k.swapaxes(2, 3))
    weights = scores.astype(wide_dtype(scores.dtype), copy=False)
    if causal:
        length = weights.shape[-1]
        weights += xp.triu(xp.full((length, length), -math.inf, weights.dtype), 1)
    weights -= weights.max(axis=-1, keepdims=True)
    xp.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights.astype(scores.dtype, copy=False)


def _gradient(grad: Array | None) -> Array:
    assert grad is not None, "linear maps have gradients"
    return grad
