"""ParallelUnembedding: scores by the table of a ParallelEmbedding, which both layers share."""

from __future__ import annotations

from ferro import ProcessGroup

from ..nn.arrays import Array
from ..nn.module import Module, Pullback
from ..nn.parameter import Use
from ..nn.unembedding import Unembedding
from ..parts import even_sizes
from .column import check_positions, column_products
from .embedding import ParallelEmbedding
from .pieces import check_layer, check_sizes, piece_of


class ParallelUnembedding(Module):
    """y = x @ table.T, of which this rank computes the columns of its words: tied weights.

        table = ParallelEmbedding(words, dim, group, rng=seed)
        model = Sequential(table, *blocks, ParallelUnembedding(table))

    `parallelize` makes the pair of an Embedding and an Unembedding, both in the plan.
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

    @classmethod
    def from_serial(
        cls, layer: Module, group: ProcessGroup, *, sequence_parallel: bool = False
    ) -> ParallelUnembedding:
        """Take this rank's words of an Unembedding that all ranks have; all call it.

        By itself it has a piece of its own; `parallelize` lets it share that of the table.

        Raises:
            UsageError: it is no Unembedding, differs between ranks, or has too few words.
        """
        options = {"sequence_parallel": sequence_parallel}
        whole = check_layer(cls, layer, Unembedding, group, options)
        words = whole.weight.data.shape[0]
        sizes = even_sizes(words, group.world_size)
        check_sizes(cls, "words", words, sizes, group)
        made = cls.__new__(cls)
        made.training = whole.training
        made.weight = piece_of(whole.weight, group, 0, sizes)
        made.group = group
        made.sequence_parallel = sequence_parallel
        return made

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
