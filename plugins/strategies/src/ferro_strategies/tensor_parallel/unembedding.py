"""ParallelUnembedding: output layer that shares the table of a ParallelEmbedding."""

from __future__ import annotations

from ferro import ProcessGroup
from ferro.collectives.partition import even_sizes

from ..nn.arrays import Array
from ..nn.checks import checked_pullback
from ..nn.module import Module, Pullback
from ..nn.parameter import Use
from ..nn.unembedding import Unembedding
from .column import check_column_input, column_parallel_matmul
from .conversion import check_serial_layer, check_shard_sizes, sharded_copy
from .embedding import ParallelEmbedding


class ParallelUnembedding(Module):
    """Compute y = x @ table.T with tied weights; each rank computes its words' columns.

        table = ParallelEmbedding(words, dim, group, rng=seed)
        model = Sequential(table, *blocks, ParallelUnembedding(table))

    `parallelize` makes such a pair from an Embedding and an Unembedding that are both in the plan.
    The layers share one parameter, sharded along the words; its gradient is the sum of theirs.
    The scores are sharded as those of a ColumnParallelLinear: use `vocab_parallel_cross_entropy`.

    Args:
        table: the embedding, made before; its parameter is shared, not copied.
        sequence_parallel: see ColumnParallelLinear; the embedding has an option of its own.

    Attributes:
        weight: the embedding's parameter, (this rank's words, dim).

    Source: Press and Wolf, "Using the Output Embedding to Improve Language Models", 2017;
    sharded, Shoeybi et al., "Megatron-LM", 2019, section 3.
    """

    def __init__(self, table: ParallelEmbedding, *, sequence_parallel: bool = False) -> None:
        self.weight = table.weight
        self.group = table.group
        self.sequence_parallel = sequence_parallel

    @classmethod
    def from_serial(cls, layer: Module, group: ProcessGroup, *, sequence_parallel: bool = False) -> ParallelUnembedding:
        """Make this rank's layer from an Unembedding that all ranks have; all call it.

        The layer gets a shard of its own; `parallelize` lets it share the embedding's shard.

        Raises:
            UsageError: `layer` is no Unembedding, differs between ranks, or has too few words.
        """
        options = {"sequence_parallel": sequence_parallel}
        whole = check_serial_layer(cls, layer, Unembedding, group, options)
        words = whole.weight.data.shape[0]
        sizes = even_sizes(words, group.world_size)
        check_shard_sizes(cls, "words", words, sizes, group)
        made = cls.__new__(cls)
        made.training = whole.training
        made.weight = sharded_copy(whole.weight, group, 0, sizes)
        made.group = group
        made.sequence_parallel = sequence_parallel
        return made

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (..., dim) to this rank's (..., words)."""
        features, dtype = self.weight.data.shape[1], self.weight.data.dtype
        check_column_input(self, x, features, dtype, sequences=self.sequence_parallel)
        uses = [(_TransposedUse(self.weight.use()), None)]
        (y,), pull = column_parallel_matmul(x, uses, self.group, sequence_parallel=self.sequence_parallel)
        return y, checked_pullback(self, y.shape, lambda grad_y: pull((grad_y,)))

    def __repr__(self) -> str:
        return f"ParallelUnembedding({self.group!r}, sequence_parallel={self.sequence_parallel})"


class _TransposedUse:
    """One use of a parameter's transpose."""

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
