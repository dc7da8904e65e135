"""ColumnParallelLinear: an affine map whose outputs are divided over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, UsageError, Work
from ferro.collectives.partition import even_sizes

from ..nn.arrays import Array, Rng, matmul
from ..nn.checks import check_dtype, check_input, checked_pullback
from ..nn.linear import Linear
from ..nn.module import Module, Pullback
from ..nn.parameter import Use
from ..nn.sums import column_sums
from .conversion import check_serial_layer, check_shard_sizes, sharded_copy
from .sharding import SequenceSharding, all_gather_along, from_rows, local_shard, to_rows
from .summaries import check_same_input


class ColumnParallelLinear(Module):
    """Compute y = x @ weight + bias; each rank computes some of the columns.

        x, on every rank          weight            y
        [ . . . . ]        @      [ 0 0 1 1 ]   =   [ 0 0 1 1 ]      columns of ranks 0 and 1

    The gradient of x is summed over the ranks while that of the weight is computed. The first inputs are compared.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the outputs of all ranks together; divided as by numpy.array_split.
        group: the ranks; all make the layer, and call it with the same x.
        bias: whether to add a bias, which is divided as the outputs are.
        gather_output: return all columns, on every rank, for layers that are not parallel.
        sequence_parallel: x is this rank's part (B, t, in_features) of sequences, of any length. The parts are gathered
            in the forward pass, and again in the backward pass, so that no rank keeps the whole x; the gradient of x is
            reduce-scattered instead of all-reduced.
        dtype: of the parameters and of input and output.
        rng: generator or seed for the weight, the same on all ranks. The weight is that of a
            Linear made with it.

    Attributes:
        weight: (in_features, this rank's columns).
        bias: (this rank's columns,); None without.

    Source: Shoeybi et al., "Megatron-LM", 2019, section 3; for sequence_parallel, Korthikanti et
    al., "Reducing Activation Recomputation in Large Transformer Models", 2022, section 4.2.2.
    """

    _has_compared = False  # inputs are compared over the ranks in the first pass

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
        self._init_from(whole, group, None, gather_output, sequence_parallel)

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
        """Make this rank's layer from a Linear that all ranks have; all call it.

        Args:
            layer: the Linear, which is not changed.
            group: see the class.
            sizes: columns of each rank; None: divided as by numpy.array_split.
            gather_output: see the class.
            sequence_parallel: see the class.

        Raises:
            UsageError: `layer` is no Linear, differs between ranks, or has too few columns.
        """
        made = cls.__new__(cls)
        made._init_from(layer, group, sizes, gather_output, sequence_parallel)
        return made

    def _init_from(
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
        whole = check_serial_layer(kind, layer, Linear, group, options)
        self._in_features, out = whole.weight.data.shape
        self._sizes = even_sizes(out, group.world_size) if sizes is None else tuple(sizes)
        check_shard_sizes(kind, "out_features", out, self._sizes, group)
        self.training = whole.training
        self.group = group
        self.gather_output = gather_output
        self.sequence_parallel = sequence_parallel
        self.weight = sharded_copy(whole.weight, group, 1, self._sizes)
        self.bias = None if whole.bias is None else sharded_copy(whole.bias, group, 0, self._sizes)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (..., in_features) to this rank's (..., columns), or to all with gather_output."""
        features, dtype = self.weight.data.shape[0], self.weight.data.dtype
        check_column_input(self, x, features, dtype, sequences=self.sequence_parallel)
        if not self._has_compared and not self.sequence_parallel:
            check_same_input(self, x, self.group)
            self._has_compared = True
        (y,), pull = column_parallel_matmul(x, [self.uses()], self.group, sequence_parallel=self.sequence_parallel)
        if not self.gather_output:
            return y, checked_pullback(self, y.shape, lambda grad_y: pull((grad_y,)))
        whole = all_gather_along(y, self.group, -1, self._sizes)

        def pullback(grad_y: Array) -> Array:
            return pull((local_shard(grad_y, self.group, -1, self._sizes),))

        return whole, checked_pullback(self, whole.shape, pullback)

    def uses(self) -> tuple[Use, Use | None]:
        """Register one use of weight and bias, for `column_parallel_matmul`."""
        return self.weight.use(), self.bias.use() if self.bias is not None else None

    def __repr__(self) -> str:
        return (
            f"ColumnParallelLinear({self._in_features}, {sum(self._sizes)}, {self.group!r}, "
            f"bias={self.bias is not None}, gather_output={self.gather_output}, "
            f"sequence_parallel={self.sequence_parallel})"
        )


class MatrixUse(Protocol):
    """One use of a parameter as a matrix, with the methods of `Use` that a product needs."""

    @property
    def data(self) -> Array:
        """The matrix."""

    @property
    def requires_grad(self) -> bool:
        """True if the pullback has to compute a gradient."""

    def add_grad_product(self, a: Array, b: Array) -> None:
        """Add the gradient of the matrix, `a @ b`."""


def column_parallel_matmul(
    x: Array, uses: Sequence[tuple[MatrixUse, Use | None]], group: ProcessGroup, *, sequence_parallel: bool
) -> tuple[list[Array], Callable[[Sequence[Array]], Array]]:
    """Apply several maps to one x: x is gathered, and its gradient summed, once.

    Args:
        x: (..., features); this rank's part (B, t, features) of sequences with sequence_parallel.
        uses: weight (features, this rank's columns) and bias of each map; at least one map.
        group: the ranks that have the other columns.
        sequence_parallel: see ColumnParallelLinear.

    Returns:
        The outputs, not gathered, and the function from their gradients to the gradient of x.
    """
    sharding = SequenceSharding.of_shard(x, group) if sequence_parallel else None
    own = to_rows(x, sharding)
    lead = x.shape[:-1]
    whole_lead = lead if sharding is None else sharding.whole
    whole = own if sharding is None else group.all_gather(own, sizes=sharding.rows)
    outputs = []
    for weight, bias in uses:
        y = matmul(whole, weight.data)
        if bias is not None:
            y += bias.data
        outputs.append(from_rows(y, whole_lead, sharding))

    def pullback(grads: Sequence[Array]) -> Array:
        grad_rows = [to_rows(grad, sharding) for grad in grads]
        regathered: Work[Array] | None = None
        if sharding is not None and any(weight.requires_grad for weight, _ in uses):
            regathered = group.all_gather(own, sizes=sharding.rows, async_op=True)
        partial = matmul(grad_rows[0], uses[0][0].data.T)
        for grad, (weight, _) in zip(grad_rows[1:], uses[1:], strict=True):
            partial += matmul(grad, weight.data.T)
        summed: Work[Array] = (
            group.all_reduce(partial, out=partial, async_op=True)
            if sharding is None
            else group.reduce_scatter(partial, sizes=sharding.rows, async_op=True, copy=False)
        )
        # The gradients of weights and biases are computed while the sum is under way.
        rows = own if regathered is None else regathered.wait()
        for grad, (weight, bias) in zip(grad_rows, uses, strict=True):
            if bias is not None:
                bias.add_grad(column_sums(grad))
            if weight.requires_grad:
                weight.add_grad_product(rows.T, grad)
        return from_rows(summed.wait(), lead, sharding)

    return outputs, pullback


def check_column_input(owner: Module, x: Array, features: int, dtype: npt.DTypeLike, *, sequences: bool) -> None:
    """Refuse an input that `column_parallel_matmul` cannot take.

    Raises:
        UsageError: the message names `owner`.
    """
    check_dtype(owner, x, dtype)
    fits = x.ndim > 0 and x.shape[-1] == features
    if sequences:
        check_input(owner, x, f"(B, t, {features})", fits=fits and x.ndim == 3)
    else:
        check_input(owner, x, f"(..., {features})", fits=fits)
