"""ColumnParallelLinear: an affine map of which each rank computes some of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, UsageError, Work

from ..nn.arrays import Array, Rng, matmul
from ..nn.checks import check_dtype, check_input
from ..nn.linear import Linear
from ..nn.module import Module, Pullback
from ..nn.parameter import Use
from ..parts import even_sizes
from .cuts import gather_along, take_piece
from .pieces import check_layer, check_sizes, piece_of
from .sequence import SequenceCut, from_rows, rows_of


class ColumnParallelLinear(Module):
    """y = x @ weight + bias, of which this rank computes its columns.

        x, on every rank          weight            y
        [ . . . . ]        @      [ 0 0 1 1 ]   =   [ 0 0 1 1 ]      columns of ranks 0 and 1

    The gradient of x, a sum over the ranks, is on its way while the weight's is computed.

    Args:
        in_features: size of the last dimension of x.
        out_features: that of all ranks' outputs together; cut as numpy.array_split does.
        group: the ranks; all make the layer, and call it with the same x.
        bias: whether to add a bias, which is cut as the outputs are.
        gather_output: return all columns, on every rank, for layers that are not parallel.
        sequence_parallel: x is this rank's part (B, t, in_features) of sequences, of any length.
            The parts are gathered, and again in the backward pass, so that no rank keeps the
            whole; the gradient of x is scattered instead of summed.
        dtype: of the parameters and of input and output.
        rng: generator or seed for the weight, the same on all ranks, which then have the values
            of a Linear made with it.

    Attributes:
        weight: (in_features, this rank's columns).
        bias: (this rank's columns,); None without.

    Source: Shoeybi et al., "Megatron-LM", 2019, section 3; for sequence_parallel, Korthikanti et
    al., "Reducing Activation Recomputation in Large Transformer Models", 2022, section 4.2.2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: ProcessGroup,
        bias: bool = True,
        *,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        whole = Linear(in_features, out_features, bias, dtype=dtype, rng=rng)
        self._take(whole, group, None, gather_output, sequence_parallel)

    @classmethod
    def from_serial(
        cls,
        layer: Module,
        group: ProcessGroup,
        *,
        sizes: Sequence[int] | None = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
    ) -> ColumnParallelLinear:
        """Take this rank's columns of a Linear that all ranks have; all call it.

        Args:
            layer: the Linear, which stays as it is.
            group: see the class.
            sizes: columns of each rank; None: as numpy.array_split cuts them.
            gather_output: see the class.
            sequence_parallel: see the class.

        Raises:
            UsageError: it is no Linear, differs between ranks, or has too few columns.
        """
        made = cls.__new__(cls)
        made._take(layer, group, sizes, gather_output, sequence_parallel)
        return made

    def _take(
        self,
        layer: Module,
        group: ProcessGroup,
        sizes: Sequence[int] | None,
        gather_output: bool,
        sequence_parallel: bool,
    ) -> None:
        kind = type(self)
        if gather_output and sequence_parallel:
            raise UsageError(
                f"{kind.__name__}: gather_output makes whole sequences, of which "
                "sequence_parallel layers keep parts. Choose one."
            )
        options = {"gather_output": gather_output, "sequence_parallel": sequence_parallel}
        whole = check_layer(kind, layer, Linear, group, options)
        self._in_features, out = whole.weight.data.shape
        self._sizes = even_sizes(out, group.world_size) if sizes is None else tuple(sizes)
        check_sizes(kind, "out_features", out, self._sizes, group)
        self.training = whole.training
        self.group = group
        self.gather_output = gather_output
        self.sequence_parallel = sequence_parallel
        self.weight = piece_of(whole.weight, group, 1, self._sizes)
        self.bias = None if whole.bias is None else piece_of(whole.bias, group, 0, self._sizes)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (..., in_features) to this rank's (..., columns), or to all with gather_output."""
        features, dtype = self.weight.data.shape[0], self.weight.data.dtype
        check_positions(self, x, features, dtype, sequences=self.sequence_parallel)
        (y,), pull = column_products(
            x, [self.uses()], self.group, sequence_parallel=self.sequence_parallel
        )
        if not self.gather_output:
            return y, lambda grad_y: pull((grad_y,))

        def pullback(grad_y: Array) -> Array:
            return pull((take_piece(grad_y, self.group, -1, self._sizes),))

        return gather_along(y, self.group, -1, self._sizes), pullback

    def uses(self) -> tuple[Use, Use | None]:
        """Announce one use of weight and bias, for `column_products`."""
        return self.weight.use(), self.bias.use() if self.bias is not None else None

    def __repr__(self) -> str:
        return (
            f"ColumnParallelLinear({self._in_features}, {sum(self._sizes)}, {self.group!r}, "
            f"bias={self.bias is not None}, gather_output={self.gather_output}, "
            f"sequence_parallel={self.sequence_parallel})"
        )


class MatrixUse(Protocol):
    """One use of a parameter as a matrix: see `Use`."""

    @property
    def data(self) -> Array:
        """The matrix."""

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted."""

    def add_grad_product(self, a: Array, b: Array) -> None:
        """Add the gradient of the matrix, `a @ b`."""


def column_products(
    x: Array,
    uses: Sequence[tuple[MatrixUse, Use | None]],
    group: ProcessGroup,
    *,
    sequence_parallel: bool,
) -> tuple[list[Array], Callable[[Sequence[Array]], Array]]:
    """Give one x to several maps: x is gathered, and its gradient summed, once.

    Args:
        x: (..., features); this rank's part (B, t, features) of sequences with sequence_parallel.
        uses: of each map, at least one, its weight (features, this rank's columns) and bias.
        group: the ranks that have the other columns.
        sequence_parallel: see ColumnParallelLinear.

    Returns:
        The outputs, not gathered, and the function from their gradients to that of x.
    """
    cut = SequenceCut.of_piece(x, group) if sequence_parallel else None
    own = rows_of(x, cut)
    lead = x.shape[:-1]
    whole_lead = lead if cut is None else cut.whole
    whole = own if cut is None else group.all_gather(own, sizes=cut.rows)
    outputs = []
    for weight, bias in uses:
        y = matmul(whole, weight.data)
        if bias is not None:
            y += bias.data
        outputs.append(from_rows(y, whole_lead, cut))

    def pullback(grads: Sequence[Array]) -> Array:
        grad_rows = [rows_of(grad, cut) for grad in grads]
        regathered: Work[Array] | None = None
        if cut is not None and any(weight.requires_grad for weight, _ in uses):
            regathered = group.all_gather(own, sizes=cut.rows, async_op=True)
        partial = matmul(grad_rows[0], uses[0][0].data.T)
        for grad, (weight, _) in zip(grad_rows[1:], uses[1:], strict=True):
            partial += matmul(grad, weight.data.T)
        summed: Work[Array] = (
            group.all_reduce(partial, out=partial, async_op=True)
            if cut is None
            else group.reduce_scatter(partial, sizes=cut.rows, async_op=True, copy=False)
        )
        # While the sum is on its way:
        rows = own if regathered is None else regathered.wait()
        for grad, (weight, bias) in zip(grad_rows, uses, strict=True):
            if bias is not None:
                bias.add_grad(grad.sum(axis=0))
            if weight.requires_grad:
                weight.add_grad_product(rows.T, grad)
        return from_rows(summed.wait(), lead, cut)

    return outputs, pullback


def check_positions(
    owner: Module, x: Array, features: int, dtype: npt.DTypeLike, *, sequences: bool
) -> None:
    """Refuse an input that `column_products` does not take.

    Raises:
        UsageError: the message names `owner`.
    """
    check_dtype(owner, x, dtype)
    fits = x.ndim > 0 and x.shape[-1] == features
    if sequences:
        check_input(owner, x, f"(B, t, {features})", fits=fits and x.ndim == 3)
    else:
        check_input(owner, x, f"(..., {features})", fits=fits)
