"""ParallelUnembedding: scores by the table of a ParallelEmbedding, which both layers share."""

from __future__ import annotations

from ..nn.arrays import Array
from ..nn.module import Module, Pullback
from ..nn.use import Use
from .column import check_positions, column_products
from .embedding import ParallelEmbedding


class ParallelUnembedding(Module):
    """y = x @ table.T, of which this rank computes the columns of its words: tied weights.

        table = ParallelEmbedding(words, dim, group, rng=seed)
        model = Sequential(table, *blocks, ParallelUnembedding(table))

    Both layers have one parameter, in pieces along the words; its gradient is the sum of theirs.
    The scores are those of a ColumnParallelLinear, so for `vocab_parallel_cross_entropy`.

    Args:
        table: the embedding, made before; its parameter is shared, not copied.
        sequence_parallel: see ColumnParallelLinear; the table has a choice of its own.

    Attributes:
        weight: that of the table, (this rank's words, dim).

    Source: Press and Wolf, "Using the Output Embedding to Improve Language Models", 2017; in
    pieces, Shoeybi et al., "Megatron-LM", 2019, section 3.
    """

    def __init__(self, table: ParallelEmbedding, *, sequence_parallel: bool = False) -> None:
        self.weight = table.weight
        self.group = table.group
        self.sequence_parallel = sequence_parallel

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (..., dim) to this rank's (..., words)."""
        features, dtype = self.weight.data.shape[1], self.weight.data.dtype
        check_positions(self, x, features, dtype, sequences=self.sequence_parallel)
        uses = [(_TransposedUse(self.weight.use()), None)]
        (y,), pull = column_products(x, uses, self.group, sequence_parallel=self.sequence_parallel)
        return y, lambda grad_y: pull((grad_y,))

    def __repr__(self) -> str:
        return f"ParallelUnembedding({self.group!r}, sequence_parallel={self.sequence_parallel})"


class _TransposedUse:
    """One use of a parameter as the transpose of what it is."""

    def __init__(self, use: Use) -> None:
        self._use = use

    @property
    def data(self) -> Array:
        return self._use.data.T

    @property
    def requires_grad(self) -> bool:
        return self._use.requires_grad

    def add_grad_product(self, a: Array, b: Array) -> None:
        self._use.add_grad_product(b.T, a.T)
