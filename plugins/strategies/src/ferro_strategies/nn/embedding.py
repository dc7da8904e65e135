"""Embedding: a table of vectors, looked up by index."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

from .arrays import Array, Rng, namespace_of
from .checks import check_gradient, check_positive
from .module import Module, Pullback
from .parameter import Parameter


class Embedding(Module):
    """Replace each index by its row of the table: (...) integers -> (..., dim).

    Args:
        num_embeddings: number of rows; indices are 0 to num_embeddings - 1.
        dim: length of a row.
        dtype: dtype of the table and the output.
        rng: random generator or seed for the table.

    Attributes:
        num_embeddings: as given.
        dim: as given.
        weight: (num_embeddings, dim), standard normal at first.
    """

    def __init__(self, num_embeddings: int, dim: int, *, dtype: npt.DTypeLike = np.float32, rng: Rng = None) -> None:
        check_positive("Embedding", num_embeddings=num_embeddings, dim=dim)
        self.num_embeddings = num_embeddings
        self.dim = dim
        table = np.random.default_rng(rng).standard_normal((num_embeddings, dim)).astype(dtype)
        self.weight = Parameter(table, name="weight")

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Look up rows; the pullback returns None, because indices have no gradient.

        Raises:
            UsageError: `x` is not of integers, or an index is out of range.
        """
        xp = namespace_of(x)
        rows, dim = self.weight.data.shape
        if x.dtype.kind not in "iu":
            raise UsageError(f"{self!r}: expected integer indices, got {x.dtype}.")
        if x.size and (int(x.min()) < 0 or int(x.max()) >= rows):
            raise UsageError(f"{self!r}: expected indices from 0 to {rows - 1}, got {int(x.min())} to {int(x.max())}.")
        weight = self.weight.use()

        def pullback(grad_y: Array) -> None:
            check_gradient(self, grad_y, (*x.shape, dim))
            # Equal indices are sorted together and their gradients summed: `add_grad_rows` must get
            # each row once.
            indices = x.reshape(x.size)
            order = xp.argsort(indices, kind="stable")
            unique, starts = xp.unique(indices[order], return_index=True)
            grads = grad_y.reshape(x.size, dim)[order]
            if x.size:
                grads = xp.add.reduceat(grads, starts, axis=0)
            weight.add_grad_rows(unique, grads)

        return weight.data[x], pullback

    def __repr__(self) -> str:
        return f"Embedding({self.num_embeddings}, {self.dim})"
