"""RowParallelLinear: an affine map of which each rank has some of the inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, Rng, matmul
from ..nn.checks import check_dtype, check_input
from ..nn.linear import Linear
from ..nn.module import Module, Pullback
from ..parts import even_sizes
from .cuts import gather_along, take_piece
from .pieces import check_layer, check_sizes, piece_of, replica_of
from .sequence import SequenceCut, from_rows, rows_of


class RowParallelLinear(Module):
    """y = x @ weight + bias, summed over the ranks, each with its rows of the weight.

        x                   weight            y, on every rank
        [ 0 0 1 1 ]    @    [ 0 0 0 ]    =    [ . . . ]      inputs of ranks 0 and 1
                            [ 0 0 0 ]
                            [ 1 1 1 ]
                            [ 1 1 1 ]

    Args:
        in_features: size of the last dimension of all ranks' x together; cut as
            numpy.array_split does.
        out_features: that of y.
        group: the ranks; all make the layer.
        bias: whether to add a bias, which every rank has, with the same gradient.
        input_is_parallel: x is this rank's inputs, as a ColumnParallelLinear makes them;
            otherwise all inputs, on every rank.
        sequence_parallel: each rank keeps its part (B, t, out_features) of the sequences, cut as
            numpy.array_split does.
        dtype: of the parameters and of input and output.
        rng: generator or seed for the weight, the same on all ranks, which then have the values
            of a Linear made with it.

    Attributes:
        weight: (this rank's inputs, out_features).
        bias: (out_features,), added once, after the sum; None without.

    Source: as ColumnParallelLinear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: ProcessGroup,
        bias: bool = True,
        *,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        whole = Linear(in_features, out_features, bias, dtype=dtype, rng=rng)
        self._take(whole, group, None, input_is_parallel, sequence_parallel)

    @classmethod
    def from_serial(
        cls,
        layer: Module,
        group: ProcessGroup,
        *,
        sizes: Sequence[int] | None = None,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
    ) -> RowParallelLinear:
        """Take this rank's rows of a Linear that all ranks have; all call it.

        Args:
            layer: the Linear, which stays as it is.
            group: see the class.
            sizes: inputs of each rank; None: as numpy.array_split cuts them.
            input_is_parallel: see the class.
            sequence_parallel: see the class.

        Raises:
            UsageError: it is no Linear, differs between ranks, or has too few rows.
        """
        made = cls.__new__(cls)
        made._take(layer, group, sizes, input_is_parallel, sequence_parallel)
        return made

    def _take(
        self,
        layer: Module,
        group: ProcessGroup,
        sizes: Sequence[int] | None,
        input_is_parallel: bool,
        sequence_parallel: bool,
    ) -> None:
        kind = type(self)
        if sequence_parallel and not input_is_parallel:
            raise UsageError(
                f"{kind.__name__}: sequence_parallel needs input_is_parallel, for inputs that "
                "every rank has come with parts of the sequences otherwise. Choose one."
            )
        options = {"input_is_parallel": input_is_parallel, "sequence_parallel": sequence_parallel}
        whole = check_layer(kind, layer, Linear, group, options)
        inner, self._out_features = whole.weight.data.shape
        self._sizes = even_sizes(inner, group.world_size) if sizes is None else tuple(sizes)
        check_sizes(kind, "in_features", inner, self._sizes, group)
        self.training = whole.training
        self.group = group
        self.input_is_parallel = input_is_parallel
        self.sequence_parallel = sequence_parallel
        self.weight = piece_of(whole.weight, group, 0, self._sizes)
        self.bias = None if whole.bias is None else replica_of(whole.bias)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map this rank's (..., inputs), or all of them, to (..., out_features)."""
        self._check(x)
        group = self.group
        weight = self.weight.use()
        bias = self.bias.use() if self.bias is not None else None
        cut = SequenceCut.of_whole(x, group) if self.sequence_parallel else None
        x_lead = y_lead = x.shape[:-1]
        inputs = x if self.input_is_parallel else take_piece(x, group, -1, self._sizes)
        rows = rows_of(inputs, cut)
        y = matmul(rows, weight.data)
        if cut is None:
            y = group.all_reduce(y, out=y)
        else:
            y = group.reduce_scatter(y, sizes=cut.rows)
            y_lead = (cut.batch, cut.lengths[group.rank])
        if bias is not None:
            y += bias.data

        def pullback(grad_y: Array) -> Array:
            grad_rows = rows_of(grad_y, cut)
            if cut is not None:
                grad_rows = group.all_gather(grad_rows, sizes=cut.rows)
            # Gathered, the gradient is that of all positions: so is the bias', on every rank.
            if bias is not None:
                bias.add_grad(grad_rows.sum(axis=0))
            if weight.requires_grad:
                weight.add_grad_product(rows.T, grad_rows)
            grad_x = from_rows(matmul(grad_rows, weight.data.T), x_lead, cut)
            if self.input_is_parallel:
                return grad_x
            return gather_along(grad_x, group, -1, self._sizes)

        return from_rows(y, y_lead, cut), pullback

    def _check(self, x: Array) -> None:
        check_dtype(self, x, self.weight.data.dtype)
        parallel = self.input_is_parallel
        features = self._sizes[self.group.rank] if parallel else sum(self._sizes)
        fits = x.ndim > 0 and x.shape[-1] == features
        if self.sequence_parallel:
            check_input(self, x, f"(B, T, {features})", fits=fits and x.ndim == 3)
        else:
            check_input(self, x, f"(..., {features})", fits=fits)

    def __repr__(self) -> str:
        return (
            f"RowParallelLinear({sum(self._sizes)}, {self._out_features}, {self.group!r}, "
            f"bias={self.bias is not None}, input_is_parallel={self.input_is_parallel}, "
            f"sequence_parallel={self.sequence_parallel})"
        )
