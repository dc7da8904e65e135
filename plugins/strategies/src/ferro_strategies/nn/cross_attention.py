"""CrossAttention: positions of one sequence attend to those of another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

from .arguments import check_real_dtype, whole_number
from .arrays import Array, Rng, namespace_of
from .attention import attend, check_mask, gradient, head_numbers
from .checks import check_gradient, check_input
from .dropout import Dropout
from .linear import Linear
from .module import Module, Pullback
from .trees import Arrays, describe


class CrossAttention(Module):
    """Multi-head attention of a query to a memory: ((B, T, dim), (B, S, memory_dim)) -> (B, T, dim).

    The input is a tuple (x, memory) or (x, memory, mask), as in a decoder, whose memory is the encoder's output. The
    mask is boolean, (B, S) or (B, T, S): **True for the positions of the memory to which x attends**, False for
    padding. A position that may attend to nothing gets zeros from the heads. The pullback's result is a tuple, too: the
    gradients of x and memory, and None for a mask.

    Args:
        dim: size of the last dimension of x and of the output.
        num_heads: see Attention, as are the arguments that are not here.
        memory_dim: size of the last dimension of the memory; None: `dim`.
        bias: whether the four linear layers have biases.
        num_kv_heads: see Attention.
        dropout: see Attention.
        dtype: dtype of the parameters, the input and the output.
        rng: random generator or seed for the weights, drawn in the order of the attributes, and then for dropout.

    Attributes:
        dim, num_heads, memory_dim, bias, num_kv_heads: as given.
        query: Linear, dim -> dim.
        key: Linear, memory_dim -> num_kv_heads * dim / num_heads.
        value: as `key`.
        output: Linear, dim -> dim.
        dropout: a Dropout, or None without.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        memory_dim: int | None = None,
        bias: bool = True,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        check_real_dtype("CrossAttention", dtype)
        self.dim, self.num_heads, self.num_kv_heads = head_numbers("CrossAttention", dim, num_heads, num_kv_heads)
        self.memory_dim = self.dim if memory_dim is None else whole_number("CrossAttention", "memory_dim", memory_dim)
        self.bias = bias
        draws = np.random.default_rng(rng)
        inner = self.num_kv_heads * (self.dim // self.num_heads)
        self.query = Linear(self.dim, self.dim, bias, dtype=dtype, rng=draws)
        self.key = Linear(self.memory_dim, inner, bias, dtype=dtype, rng=draws)
        self.value = Linear(self.memory_dim, inner, bias, dtype=dtype, rng=draws)
        self.output = Linear(self.dim, self.dim, bias, dtype=dtype, rng=draws)
        self.dropout = Dropout(dropout, draws) if dropout else None

    def vjp(self, x: Arrays) -> tuple[Array, Pullback]:
        """Map a tuple of (B, T, dim), (B, S, memory_dim) and perhaps a mask to (B, T, dim), T and S at least 1."""
        x, memory, mask = self._check(x)
        query, pull_query = self.query.vjp(x)
        key, pull_key = self.key.vjp(memory)
        value, pull_value = self.value.vjp(memory)
        mixed, pull_heads = attend(
            query,
            key,
            value,
            self.num_heads,
            causal=False,
            num_kv_heads=self.num_kv_heads,
            mask=mask,
            dropout=self.dropout,
        )
        y, pull_output = self.output.vjp(mixed)
        shape = y.shape

        def pullback(grad_y: Array) -> Arrays:
            check_gradient(self, grad_y, shape, real=True)
            grad_q, grad_k, grad_v = pull_heads(gradient(pull_output(grad_y)))
            grad_memory = gradient(pull_key(grad_k)) + gradient(pull_value(grad_v))
            grads = gradient(pull_query(grad_q)), grad_memory
            return grads if mask is None else (*grads, None)

        return y, pullback

    def _check(self, x: Arrays) -> tuple[Array, Array, Array | None]:
        """Take an input apart, and check it."""
        if not isinstance(x, tuple | list) or len(x) not in (2, 3):
            raise UsageError(f"{self!r}: expected a tuple (x, memory) or (x, memory, mask), got {describe(x)}.")
        query, memory, mask = x if len(x) == 3 else (*x, None)
        for array, size, what in ((query, self.dim, "x"), (memory, self.memory_dim, "memory")):
            namespace_of(array)
            fits = array.ndim == 3 and array.shape[1] > 0 and array.shape[2] == size
            check_input(self, array, f"(B, at least 1, {size}) for {what}", fits=fits)
        expected = f"({query.shape[0]}, S, {self.memory_dim}) for memory, as many rows as x has"
        check_input(self, memory, expected, fits=len(query) == len(memory))
        if mask is not None:
            check_mask(self, mask, query.shape[0], query.shape[1], memory.shape[1])
        return query, memory, mask

    def __repr__(self) -> str:
        text = f"CrossAttention({self.dim}, {self.num_heads}, bias={self.bias}"
        if self.memory_dim != self.dim:
            text += f", memory_dim={self.memory_dim}"
        if self.num_kv_heads != self.num_heads:
            text += f", num_kv_heads={self.num_kv_heads}"
        return f"{text})" if self.dropout is None else f"{text}, dropout={self.dropout.p})"
