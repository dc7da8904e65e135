"""ParallelEmbedding: a table whose rows are divided over the ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, UsageError
from ferro.collectives.partition import even_sizes

from ..nn.arrays import Array, Rng, namespace_of
from ..nn.checks import check_gradient, check_input
from ..nn.embedding import Embedding
from ..nn.module import Module, Pullback
from .conversion import check_serial_layer, check_shard_sizes, sharded_copy
from .sharding import SequenceSharding, from_rows, shard_slice, to_rows
from .summaries import begin_comparison, different_inputs, end_comparison


class ParallelEmbedding(Embedding):
    """Replace each index by its row, which one of the ranks has: (...) integers -> (..., dim).

    Each rank looks up its own rows and puts zeros elsewhere, so the sum over the ranks is exact.

    Args:
        num_embeddings: rows of all ranks together; divided as by numpy.array_split.
        dim: length of a row.
        group: the ranks; all make the layer, and call it with the same indices.
        sequence_parallel: indices are (B, T), all of them on every rank, and each rank keeps its
            part (B, t, dim) of the result, divided as by numpy.array_split.
        dtype: of the table and of the output.
        rng: generator or seed for the table, the same on all ranks. The rows are those of an
            Embedding made with it.

    Attributes:
        weight: (this rank's rows, dim).

    Source: Shoeybi et al., "Megatron-LM", 2019, section 3.
    """

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        group: ProcessGroup,
        *,
        sequence_parallel: bool = False,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        whole = Embedding(num_embeddings, dim, dtype=dtype, rng=rng)
        self._init_from(whole, group, sequence_parallel)

    @classmethod
    def from_serial(cls, layer: Module, group: ProcessGroup, *, sequence_parallel: bool = False) -> ParallelEmbedding:
        """Make this rank's layer from an Embedding that all ranks have; all call it.

        Raises:
            UsageError: `layer` is no Embedding, differs between ranks, or has too few rows.
        """
        made = cls.__new__(cls)
        made._init_from(layer, group, sequence_parallel)
        return made

    def _init_from(self, layer: Module, group: ProcessGroup, sequence_parallel: bool) -> None:
        kind = type(self)
        options = {"sequence_parallel": sequence_parallel}
        whole = check_serial_layer(kind, layer, Embedding, group, options)
        rows, self._dim = whole.weight.data.shape
        self._sizes = even_sizes(rows, group.world_size)
        check_shard_sizes(kind, "num_embeddings", rows, self._sizes, group)
        self.training = whole.training
        self.group = group
        self.sequence_parallel = sequence_parallel
        own = shard_slice(self._sizes, group.rank)
        if whole.padding_idx is not None and own.start <= whole.padding_idx < own.stop:
            self.padding_idx = whole.padding_idx - own.start  # of this rank's rows, as the indices that it looks up
        self.weight = sharded_copy(whole.weight, group, 0, self._sizes)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Look up rows; the pullback returns None, because indices have no gradient.

        Raises:
            UsageError: `x` is not of integers, or an index is out of range.
        """
        self._check(x)
        xp, group = namespace_of(x), self.group
        comparison = begin_comparison(x, group)
        sharding = SequenceSharding.of_whole(x, group) if self.sequence_parallel else None
        # int64 holds any row's number; this rank's rows may lie beyond the range of x's dtype.
        indices = (x if sharding is None else x.T).reshape(x.size).astype(np.int64, copy=False)
        own = shard_slice(self._sizes, group.rank)
        positions = xp.flatnonzero((indices >= own.start) & (indices < own.stop))
        found, pull = super().vjp(indices[positions] - own.start)
        y = xp.zeros((x.size, self._dim), found.dtype)
        y[positions] = found
        lead = x.shape
        if not end_comparison(comparison):
            raise different_inputs(repr(self), group)
        if sharding is None:
            y = group.all_reduce(y, out=y)
        else:
            y = group.reduce_scatter(y, sizes=sharding.rows)
            lead = (sharding.batch, sharding.lengths[group.rank])
        shape = (*lead, self._dim)

        def pullback(grad_y: Array) -> None:
            check_gradient(self, grad_y, shape)
            grad = to_rows(grad_y, sharding)
            if sharding is not None:
                grad = group.all_gather(grad, sizes=sharding.rows)
            pull(grad[positions])

        return from_rows(y, lead, sharding), pullback

    def _check(self, x: Array) -> None:
        namespace_of(x)
        rows = sum(self._sizes)
        if self.sequence_parallel:
            check_input(self, x, "(B, T)", fits=x.ndim == 2)
        if x.dtype.kind not in "iu":
            raise UsageError(f"{self!r}: expected integer indices, got {x.dtype}.")
        if x.size and (int(x.min()) < 0 or int(x.max()) >= rows):
            raise UsageError(f"{self!r}: expected indices from 0 to {rows - 1}, got {int(x.min())} to {int(x.max())}.")

    def __repr__(self) -> str:
        return (
            f"ParallelEmbedding({sum(self._sizes)}, {self._dim}, {self.group!r}, "
            f"sequence_parallel={self.sequence_parallel})"
        )
