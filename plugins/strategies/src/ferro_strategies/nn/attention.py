"""Multi-head self-attention, and the scaled dot-product attention in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

from .arguments import check_real_dtype, whole_number
from .arrays import Array, Rng, namespace_of, quiet_overflow, wide_dtype, wide_matmul
from .checks import check_gradient, check_input
from .dropout import Dropout
from .linear import Linear
from .module import Module, Pullback
from .rotary import rotate
from .sums import row_sums
from .trees import Arrays, describe

# A function from the gradient of the heads' output to those of query, key and value.
_Pull = Callable[[Array], tuple[Array, Array, Array]]


class Attention(Module):
    """Multi-head self-attention: (B, T, dim) -> (B, T, dim), or (x, mask) -> (B, T, dim) with a mask.

    Each head has dim / num_heads columns of query, key and value, side by side:

        output(concatenate over heads of softmax(q @ k.T / sqrt(dim / num_heads)) @ v)

    `mask` is a boolean array, (B, T) or (B, T, T): **True for the keys to which positions attend**, False for padding.
    (torch's key_padding_mask has it the other way round.) A position that may attend to nothing gets zeros from the
    heads. The pullback's result for (x, mask) is (gradient, None).

    The pullback keeps q, k, v, the heads' output, and the (B, num_heads, T, T) weights.

    Args:
        dim: size of the last dimension.
        num_heads: number of heads; a divisor of `dim`.
        causal: whether a position attends only to itself and the positions before it.
        bias: whether the four linear layers have biases.
        num_kv_heads: number of heads of key and value, a divisor of `num_heads`, each shared by as many neighbouring
            heads of the query (grouped-query attention; 1 is multi-query attention). None: `num_heads`.
        dropout: probability that a weight becomes zero in training, see Dropout.
        rotary_base: base of rotary positions, such as 10000.0, see `rotate`; None: the layer knows no positions.
        dtype: dtype of the parameters, the input and the output.
        rng: random generator or seed for the weights, drawn in the order of the attributes, and then for dropout.

    Attributes:
        dim, num_heads, causal, bias, num_kv_heads, rotary_base: as given.
        query, key, value, output: each a Linear, dim -> dim; dim -> num_kv_heads * dim / num_heads for key and value.
        dropout: a Dropout, or None without.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2; for num_kv_heads, Ainslie et al., "GQA",
    2023, section 2.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = True,
        bias: bool = True,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        rotary_base: float | None = None,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        check_real_dtype("Attention", dtype)
        self.dim, self.num_heads, self.num_kv_heads = head_numbers("Attention", dim, num_heads, num_kv_heads)
        size = self.dim // self.num_heads
        if rotary_base is not None and (size % 2 or not rotary_base > 0):
            raise UsageError(
                f"Attention: rotary positions need a positive base and heads of an even number of columns, "
                f"got {rotary_base} and {size}."
            )
        self.causal = causal
        self.bias = bias
        self.rotary_base = rotary_base
        draws = np.random.default_rng(rng)
        inner = self.num_kv_heads * size
        self.query = Linear(self.dim, self.dim, bias, dtype=dtype, rng=draws)
        self.key = Linear(self.dim, inner, bias, dtype=dtype, rng=draws)
        self.value = Linear(self.dim, inner, bias, dtype=dtype, rng=draws)
        self.output = Linear(self.dim, self.dim, bias, dtype=dtype, rng=draws)
        self.dropout = Dropout(dropout, draws) if dropout else None

    def vjp(self, x: Arrays) -> tuple[Array, Pullback]:
        """Map (B, T, dim), or a tuple of it and a mask, to (B, T, dim), T at least 1."""
        x, mask = self._check(x)
        (query, pull_query), (key, pull_key), (value, pull_value) = (
            part.vjp(x) for part in (self.query, self.key, self.value)
        )
        dtype, base, heads, kv_heads = x.dtype, self.rotary_base, self.num_heads, self.num_kv_heads
        if base is not None:
            query, key = rotate(query, heads, base=base), rotate(key, kv_heads, base=base)
        mixed, pull_heads = attend(
            query, key, value, heads, causal=self.causal, num_kv_heads=kv_heads, mask=mask, dropout=self.dropout
        )
        y, pull_output = self.output.vjp(mixed)
        shape = y.shape

        def pullback(grad_y: Array) -> Arrays:
            check_gradient(self, grad_y, shape, real=True)
            grad_q, grad_k, grad_v = pull_heads(gradient(pull_output(grad_y)))
            if base is not None:
                with quiet_overflow(dtype):
                    grad_q = rotate(grad_q, heads, base=base, backwards=True).astype(dtype, copy=False)
                    grad_k = rotate(grad_k, kv_heads, base=base, backwards=True).astype(dtype, copy=False)
            grad_x = gradient(pull_query(grad_q))
            for pull, grad in ((pull_key, grad_k), (pull_value, grad_v)):
                grad_x = grad_x + gradient(pull(grad))
            return grad_x if mask is None else (grad_x, None)

        return y, pullback

    def _check(self, x: Arrays) -> tuple[Array, Array | None]:
        """Take an input apart, and check it."""
        x, mask = input_and_mask(self, x)
        namespace_of(x)
        fits = x.ndim == 3 and x.shape[1] > 0 and x.shape[2] == self.dim
        check_input(self, x, f"(B, T >= 1, {self.dim})", fits=fits)
        if mask is not None:
            check_mask(self, mask, x.shape[0], x.shape[1], x.shape[1])
        return x, mask

    def __repr__(self) -> str:
        text = f"Attention({self.dim}, {self.num_heads}, causal={self.causal}, bias={self.bias}"
        if self.num_kv_heads != self.num_heads:
            text += f", num_kv_heads={self.num_kv_heads}"
        if self.dropout is not None:
            text += f", dropout={self.dropout.p}"
        return f"{text})" if self.rotary_base is None else f"{text}, rotary_base={self.rotary_base})"


def input_and_mask(layer: object, x: Arrays) -> tuple[Array, Array | None]:
    """Take the input of an attention layer apart: an array, or a tuple of an array and a mask.

    Raises:
        UsageError: it is a tuple of another length; the message names the layer.
    """
    if not isinstance(x, tuple | list):
        return x, None
    if len(x) != 2:
        raise UsageError(f"{layer!r}: expected an array, or a tuple of an array and a mask, got {describe(x)}.")
    return x[0], x[1]


def attend(
    query: Array,
    key: Array,
    value: Array,
    num_heads: int,
    *,
    causal: bool,
    num_kv_heads: int | None = None,
    mask: Array | None = None,
    dropout: Dropout | None = None,
) -> tuple[Array, _Pull]:
    """Compute for each position and head the mean of the values, weighted by softmax(query @ key.T).

    This takes one array of size (B, num_heads, T, S), which the pullback keeps, and another one
    while the pullback runs. Scores, softmax and sums of half precision are float32.

    Args:
        query: (B, T, columns), T at least 1; num_heads divides columns.
        key: (B, S, columns * num_kv_heads / num_heads), S at least 1.
        value: as `key`; its dtype is the result's.
        num_heads: number of heads, which lie side by side in the columns.
        causal: whether a position attends only to itself and the positions before it; T and S are equal then.
        num_kv_heads: number of heads of key and value, each for as many neighbouring heads of the query; None:
            num_heads.
        mask: (B, S) or (B, T, S), True for keys to which a position attends; None: it attends to all.
        dropout: sets some weights to zero, in training.

    Returns:
        The heads' outputs side by side, (B, T, columns), in the memory layout of `query`; and a
        function from their gradient to the gradients of query, key and value, each in the dtype of its array.

    Source: the pullback's sums are from Dao et al., "FlashAttention", 2022, appendix B.2.
    """
    xp, wide, dtype = namespace_of(query), wide_dtype(query.dtype), value.dtype
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    scale = 1 / math.sqrt(query.shape[2] // num_heads)
    if mask is not None and mask.ndim == 2:
        # What stands at padding has no effect, even if it is NaN.
        zero = dtype.type(0)
        key, value = (xp.where(mask[:, :, None], array, zero).astype(array.dtype) for array in (key, value))
    q = _query_heads(query.astype(wide, copy=False) * scale, kv_heads, num_heads)
    k, v = (_kv_heads(array, kv_heads).astype(wide, copy=False) for array in (key, value))
    weights = _softmax(xp, wide_matmul(q, k.swapaxes(-1, -2)), causal=causal, mask=mask)
    drop = None if dropout is None else dropout.draw(xp, weights.shape)
    mixed = xp.empty_like(query, dtype=wide)
    xp.matmul(weights if drop is None else drop(weights), v, out=_query_heads(mixed, kv_heads, num_heads))
    weights = weights.astype(dtype, copy=False)

    def pull(grad_mixed: Array) -> tuple[Array, Array, Array]:
        grad = _query_heads(grad_mixed, kv_heads, num_heads).astype(wide, copy=False)
        with quiet_overflow(dtype):
            kept = weights.astype(wide, copy=False)
            grad_v = _from_kv_heads(value, kept if drop is None else drop(kept), grad)
            # The gradient through softmax is weights * (d - sum(weights * d)), d being that of the
            # weights. The sum over keys equals the sum of grad * mixed over columns, which needs no
            # further array.
            scores = xp.matmul(grad, v.swapaxes(-1, -2))
            if drop is not None:
                scores = drop(scores)
            scores -= xp.einsum("bhgtc,bhgtc->bhgt", grad, _query_heads(mixed, kv_heads, num_heads))[..., None]
            scores *= kept
            grad_q = xp.empty_like(query, dtype=wide)
            xp.matmul(scores, k, out=_query_heads(grad_q, kv_heads, num_heads))
            grad_q *= scale
            return grad_q.astype(query.dtype, copy=False), _from_kv_heads(key, scores, q), grad_v

    with quiet_overflow(dtype):
        return mixed.astype(dtype, copy=False), pull


def head_numbers(layer: str, dim: int, num_heads: int, num_kv_heads: int | None) -> tuple[int, int, int]:
    """Check the number of columns, and those of the query's heads and of key's and value's.

    Raises:
        UsageError: a number is no whole number or less than 1, or does not divide the one before.
    """
    columns = whole_number(layer, "dim", dim)
    heads = whole_number(layer, "num_heads", num_heads)
    kv_heads = heads if num_kv_heads is None else whole_number(layer, "num_kv_heads", num_kv_heads)
    if columns % heads:
        raise UsageError(f"{layer}: dim must be a multiple of num_heads, got {columns} and {heads}.")
    if heads % kv_heads:
        raise UsageError(f"{layer}: num_heads must be a multiple of num_kv_heads, got {heads} and {kv_heads}.")
    return columns, heads, kv_heads


def check_mask(layer: Module, mask: Array, batch: int, length: int, keys: int) -> None:
    """Refuse a mask that is not boolean, or has another shape than (B, S) or (B, T, S).

    Raises:
        UsageError: the message names the layer.
    """
    namespace_of(mask)
    if mask.dtype != np.bool_ or mask.shape not in ((batch, keys), (batch, length, keys)):
        raise UsageError(
            f"{layer!r}: expected a boolean mask of shape {(batch, keys)} or {(batch, length, keys)}, True for the "
            f"keys to which positions attend; got {mask.dtype} {mask.shape}."
        )


def gradient(grad: Array | None) -> Array:
    """Take the gradient that a linear map always has."""
    assert grad is not None, "linear maps have gradients"
    return grad


def _query_heads(x: Array, kv_heads: int, num_heads: int) -> Array:
    """View (B, T, columns) as (B, kv_heads, query heads of each, T, columns of a head)."""
    batch, length, columns = x.shape
    heads = x.reshape(batch, length, kv_heads, num_heads // kv_heads, columns // num_heads)
    return heads.transpose(0, 2, 3, 1, 4)


def _kv_heads(x: Array, kv_heads: int) -> Array:
    """View (B, S, columns) as (B, kv_heads, 1, S, columns of a head)."""
    batch, length, columns = x.shape
    return x.reshape(batch, length, kv_heads, 1, columns // kv_heads).transpose(0, 2, 3, 1, 4)


def _from_kv_heads(like: Array, weights: Array, rows: Array) -> Array:
    """Compute the gradient of keys or values, an array as `like`: the sums of weights.T @ rows over the query's heads.

    Args:
        like: the keys or values, (B, S, columns).
        weights: (B, kv_heads, query heads of each, T, S).
        rows: (B, kv_heads, query heads of each, T, columns of a head).
    """
    xp = namespace_of(like)
    batch, kv_heads, _, _, keys = weights.shape
    grad = xp.empty_like(like, dtype=weights.dtype)
    shape = (batch, kv_heads, weights.shape[2] * weights.shape[3])
    stacked, stacked_rows = weights.reshape(*shape, keys), rows.reshape(*shape, rows.shape[-1])
    xp.matmul(stacked.swapaxes(2, 3), stacked_rows, out=_kv_heads(grad, kv_heads)[:, :, 0])
    rounded: Array = grad.astype(like.dtype, copy=False)
    return rounded


def _hide_later(xp: ModuleType, scores: Array) -> None:
    """Set the scores of keys after the query's position to -inf."""
    # Whole blocks are filled faster than single elements are chosen; only those on the diagonal are divided.
    length, block = scores.shape[-1], 64
    later = xp.triu(xp.ones((block, block), bool), 1)
    for start in range(0, length, block):
        stop = min(start + block, length)
        scores[..., start:stop, stop:] = -math.inf
        size = stop - start
        xp.copyto(scores[..., start:stop, start:stop], -math.inf, where=later[:size, :size])


def _softmax(xp: ModuleType, scores: Array, *, causal: bool, mask: Array | None) -> Array:
    """Turn scores (B, kv_heads, query heads, T, S) in place into their softmax over the keys that a position sees."""
    if causal:
        _hide_later(xp, scores)
    if mask is not None:
        hidden = ~mask[:, None, None, None] if mask.ndim == 2 else ~mask[:, None, None]
        xp.copyto(scores, -math.inf, where=hidden)
    top = scores.max(axis=-1, keepdims=True)
    if mask is not None:
        top[top == -math.inf] = 0  # there is no key to see
    scores -= top
    xp.exp(scores, out=scores)
    total = row_sums(scores)[..., None]
    if mask is not None:
        total[total == 0] = 1
    scores /= total
    return scores
