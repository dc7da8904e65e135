"""ParallelEmbedding: a table of which each rank has some of the rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, Rng, namespace_of
from ..nn.checks import check_input
from ..nn.embedding import Embedding
from ..nn.module import Module, Pullback
from ..parts import even_sizes
from .cuts import own_piece
from .pieces import check_layer, check_sizes, piece_of
from .sequence import SequenceCut, from_rows, rows_of


class ParallelEmbedding(Embedding):
    """Replace each index by its row, which one of the ranks has: (...) integers -> (..., dim).

    Each rank looks up its own rows, and the sum over the ranks is the result, exactly.

    Args:
        num_embeddings: rows of all ranks together; cut as numpy.array_split does.
        dim: length of a row.
        group: the ranks; all make the layer, and call it with the same indices.
        sequence_parallel: indices are (B, T), all of them on every rank, and each rank keeps its
            part (B, t, dim) of the result, cut as numpy.array_split does.
        dtype: of the table and of the output.
        rng: generator or seed for the table, the same on all ranks, which then have the rows of
            an Embedding made with it.

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
        self._take(whole, group, sequence_parallel)

    @classmethod
    def from_serial(
        cls, layer: Module, group: ProcessGroup, *, sequence_parallel: bool = False
    ) -> ParallelEmbedding:
        """Take this rank's rows of an Embedding that all ranks have; all call it.

        Raises:
            UsageError: it is no Embedding, differs between ranks, or has too few rows.
        """
        made = cls.__new__(cls)
        made._take(layer, group, sequence_parallel)
        return made

    def _take(self, layer: Module, group: ProcessGroup, sequence_parallel: bool) -> None:
        kind = type(self)
        options = {"sequence_parallel": sequence_parallel}
        whole = check_layer(kind, layer, Embedding, group, options)
        rows, self._dim = whole.weight.data.shape
        self._sizes = even_sizes(rows, group.world_size)
        check_sizes(kind, "num_embeddings", rows, self._sizes, group)
        self.training = whole.training
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.weight = piece_of(whole.weight, group, 0, self._sizes)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Look up; the pullback returns None, for indices have no gradient.

        Raises:
            UsageError: `x` is not of integers, or an index is out of range.
        """
        self._check(x)
        xp, group = namespace_of(x), self.group
        cut = SequenceCut.of_whole(x, group) if self.sequence_parallel else None
        # Wide enough for any row's number: this rank's may be beyond those that x can name.
        indices = (x if cut is None else x.T).reshape(x.size).astype(np.int64, copy=False)
        own = own_piece(self._sizes, group.rank)
        places = xp.flatnonzero((indices >= own.start) & (indices < own.stop))
        found, pull = super().vjp(indices[places] - own.start)
        y = xp.zeros((x.size, self._dim), found.dtype)
        y[places] = found
        lead = x.shape
        if cut is None:
            y = group.all_reduce(y, out=y)
        else:
            y = group.reduce_scatter(y, sizes=cut.rows)
            lead = (cut.batch, cut.lengths[group.rank])

        def pullback(grad_y: Array) -> None:
            grad = rows_of(grad_y, cut)
            if cut is not None:
                grad = group.all_gather(grad, sizes=cut.rows)
            pull(grad[places])

        return from_rows(y, lead, cut), pullback

    def _check(self, x: Array) -> None:
        namespace_of(x)
        rows = sum(self._sizes)
        if self.sequence_parallel:
            check_input(self, x, "(B, T)", fits=x.ndim == 2)
        if x.dtype.kind not in "iu":
            raise UsageError(f"{self!r}: expected integer indices, got {x.dtype}.")
        if x.size and (int(x.min()) < 0 or int(x.max()) >= rows):
            raise UsageError(
                f"{self!r}: expected indices from 0 to {rows - 1}, "
                f"got {int(x.min())} to {int(x.max())}."
            )

    def __repr__(self) -> str:
        return (
            f"ParallelEmbedding({sum(self._sizes)}, {self._dim}, {self.group!r}, "
            f"sequence_parallel={self.sequence_parallel})"
        )
