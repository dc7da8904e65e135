"""Unembedding: an output layer that shares the table of an embedding (weight tying)."""

from __future__ import annotations

from .arrays import Array, conjugate, matmul
from .checks import check_dtype, check_gradient, check_input
from .embedding import Embedding
from .module import Module, Pullback


class Unembedding(Module):
    """y = x @ table.weight.T, for x of shape (..., dim).

    table = Embedding(words, dim)
    model = Sequential(table, *blocks, Unembedding(table))

    Args:
        table: the embedding whose parameter is shared; its gradient is the sum of both layers'.

    Attributes:
        num_embeddings, dim: as those of `table`.
        weight: the parameter of `table`, (num_embeddings, dim).

    Source: Press and Wolf, "Using the Output Embedding to Improve Language Models", 2017.
    """

    def __init__(self, table: Embedding) -> None:
        self.num_embeddings = table.num_embeddings
        self.dim = table.dim
        self.weight = table.weight

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (..., dim) to (..., num_embeddings), as one matrix product."""
        words, dim = self.weight.data.shape
        check_dtype(self, x, self.weight.data.dtype)
        check_input(self, x, f"(..., {dim})", fits=x.ndim > 0 and x.shape[-1] == dim)
        weight = self.weight.use()
        rows = x.reshape(x.size // dim, dim)
        y = matmul(rows, weight.data.T).reshape(*x.shape[:-1], words)
        shape = y.shape

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, shape)
            grad_rows = grad_y.reshape(rows.shape[0], words)
            if weight.requires_grad:
                weight.add_grad_product(grad_rows.T, conjugate(rows))
            return matmul(grad_rows, conjugate(weight.data)).reshape(x.shape)

        return y, pullback

    def __repr__(self) -> str:
        return f"Unembedding({self.num_embeddings}, {self.dim})"
