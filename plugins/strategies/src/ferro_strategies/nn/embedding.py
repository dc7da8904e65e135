"""Embedding: a table of vectors, looked up by index."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

from .arguments import whole_number
from .arrays import Array, Rng, namespace_of, wide_dtype
from .checks import check_gradient
from .initialization import standard_normal
from .module import Module, Pullback
from .parameter import Parameter


class Embedding(Module):
    """Replace each index by its row of the table: (...) integers -> (..., dim).

    Args:
        num_embeddings: number of rows; indices are 0 to num_embeddings - 1.
        dim: length of a row.
        padding_idx: index of a row that stays as it is, zeros at first, because its gradient is always zero; -1 is the
            last row. None: there is no such row.
        dtype: dtype of the table and the output.
        rng: random generator or seed for the table.

    Attributes:
        num_embeddings: as given.
        dim: as given.
        padding_idx: as given, counted from the first row.
        weight: (num_embeddings, dim), standard normal at first.
    """

    padding_idx: int | None = None

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        *,
        padding_idx: int | None = None,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        self.num_embeddings = rows = whole_number("Embedding", "num_embeddings", num_embeddings)
        self.dim = whole_number("Embedding", "dim", dim)
        if padding_idx is not None:
            index = whole_number("Embedding", "padding_idx", padding_idx, least=-rows)
            if index >= rows:
                raise UsageError(f"Embedding: padding_idx must be from {-rows} to {rows - 1}, got {index}.")
            self.padding_idx = index % rows
        table = standard_normal((rows, self.dim), dtype, rng, zero_row=self.padding_idx)
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
            if self.padding_idx is not None:
                order = order[indices[order] != self.padding_idx]
            unique, starts, counts = xp.unique(indices[order], return_index=True, return_counts=True)
            grads = grad_y.reshape(x.size, dim)[order]
            if order.size > unique.size:
                wide = wide_dtype(grads.dtype)
                # A frequent index has a long sum, in which float32 would round too often.
                exact = np.promote_types(wide, np.float64) if int(counts.max()) > 128 else wide
                grads = xp.add.reduceat(grads.astype(exact, copy=False), starts, axis=0).astype(wide, copy=False)
            weight.add_grad_rows(unique, grads)

        return weight.data[x], pullback

    def __repr__(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"Embedding({self.num_embeddings}, {self.dim}{padding})"
