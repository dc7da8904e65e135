"""RowParallelLinear: an affine map whose inputs are divided over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, UsageError
from ferro.collectives.partition import even_sizes

from ..nn.arrays import Array, Rng, matmul
from ..nn.checks import check_dtype, check_gradient, check_input
from ..nn.linear import Linear
from ..nn.module import Module, Pullback
from ..nn.sums import column_sums
from .conversion import check_serial_layer, check_shard_sizes, replicated_copy, sharded_copy
from .sharding import SequenceSharding, all_gather_along, from_rows, local_shard, to_rows


class RowParallelLinear(Module):
    """Compute y = x @ weight + bias as a sum over the ranks; each rank has some rows of the weight.

        x                   weight            y, on every rank
        [ 0 0 1 1 ]    @    [ 0 0 0 ]    =    [ . . . ]      inputs of ranks 0 and 1
                            [ 0 0 0 ]
                            [ 1 1 1 ]
                            [ 1 1 1 ]

    Args:
        in_features: size of the last dimension of all ranks' x together; divided as
            by numpy.array_split.
        out_features: size of the last dimension of y.
        group: the ranks; all make the layer.
        bias: whether to add a bias, which every rank has, with the same gradient.
        input_is_parallel: x has this rank's inputs, as a ColumnParallelLinear makes them;
            otherwise it has all inputs, on every rank.
        sequence_parallel: each rank keeps its part (B, t, out_features) of the sequences, divided
            as by numpy.array_split.
        dtype: of the parameters and of input and output.
        rng: generator or seed for the weight, the same on all ranks. The weight is that of a
            Linear made with it.

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
        self._init_from(whole, group, None, input_is_parallel, sequence_parallel)

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
        """Make this rank's layer from a Linear that all ranks have; all call it.

        Args:
            layer: the Linear, which is not changed.
            group: see the class.
            sizes: inputs of each rank; None: divided as by numpy.array_split.
            input_is_parallel: see the class.
            sequence_parallel: see the class.

        Raises:
            UsageError: `layer` is no Linear, differs between ranks, or has too few rows.
        """
        made = cls.__new__(cls)
        made._init_from(layer, group, sizes, input_is_parallel, sequence_parallel)
        return made

    def _init_from(
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
        whole = check_serial_layer(kind, layer, Linear, group, options)
        inner, self._out_features = whole.weight.data.shape
        self._sizes = even_sizes(inner, group.world_size) if sizes is None else tuple(sizes)
        check_shard_sizes(kind, "in_features", inner, self._sizes, group)
        self.training = whole.training
        self.group = group
        self.input_is_parallel = input_is_parallel
        self.sequence_parallel = sequence_parallel
        self.weight = sharded_copy(whole.weight, group, 0, self._sizes)
        self.bias = None if whole.bias is None else replicated_copy(whole.bias)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map this rank's (..., inputs), or all of them, to (..., out_features)."""
        self._check(x)
        group = self.group
        weight = self.weight.use()
        bias = self.bias.use() if self.bias is not None else None
        sharding = SequenceSharding.of_whole(x, group) if self.sequence_parallel else None
        x_lead = y_lead = x.shape[:-1]
        inputs = x if self.input_is_parallel else local_shard(x, group, -1, self._sizes)
        rows = to_rows(inputs, sharding)
        y = matmul(rows, weight.data)
        if sharding is None:
            y = group.all_reduce(y, out=y)
        else:
            y = group.reduce_scatter(y, sizes=sharding.rows)
            y_lead = (sharding.batch, sharding.lengths[group.rank])
        if bias is not None:
            y += bias.data

        shape = (*y_lead, y.shape[-1])

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, shape)
            grad_rows = to_rows(grad_y, sharding)
            if sharding is not None:
                grad_rows = group.all_gather(grad_rows, sizes=sharding.rows)
            # The gathered gradient has all positions, so every rank gets the whole bias gradient.
            if bias is not None:
                bias.add_grad(column_sums(grad_rows))
            if weight.requires_grad:
                weight.add_grad_product(rows.T, grad_rows)
            grad_x = from_rows(matmul(grad_rows, weight.data.T), x_lead, sharding)
            if self.input_is_parallel:
                return grad_x
            return all_gather_along(grad_x, group, -1, self._sizes)

        return from_rows(y, y_lead, sharding), pullback

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
