"""ParallelAttention: self-attention with the heads divided over the ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup
from ferro.collectives.partition import even_sizes

from ..nn.arrays import Array, Rng, quiet_overflow
from ..nn.attention import Attention, attend, check_mask, gradient, input_and_mask
from ..nn.checks import check_dtype, check_input
from ..nn.dropout import Dropout
from ..nn.module import Module, Pullback
from ..nn.rotary import rotate
from ..nn.trees import Arrays
from .column import ColumnParallelLinear, column_parallel_matmul
from .conversion import check_serial_layer, check_shard_sizes, generator_of_rank
from .row import RowParallelLinear
from .summaries import check_same_input


class ParallelAttention(Module):
    """Multi-head self-attention: (B, T, dim) -> (B, T, dim), heads divided over the ranks.

    Query, key and value are column-parallel and share one sum of gradients; the output is
    row-parallel. The parameters have the names and values of Attention's, sharded.

    Args:
        dim: size of the last dimension.
        num_heads: heads of all ranks together, at least one for each; divided as by
            numpy.array_split, so the first ranks may have one more.
        group: the ranks; all make the layer, and call it with the same x.
        causal: whether a position sees only itself and those before it.
        bias: whether the four maps have biases.
        num_kv_heads: as in Attention; at least one for each rank. Heads that share keys and values stay together.
        dropout: as in Attention; each rank draws other numbers, for its own heads.
        rotary_base: as in Attention.
        sequence_parallel: x and the result are this rank's part (B, t, dim) of the sequences:
            x of any length, the result divided as by numpy.array_split.
        dtype: of the parameters and of input and output.
        rng: generator or seed for the weights, the same on all ranks. The weights are those of
            an Attention made with it.

    Attributes:
        query: ColumnParallelLinear with the columns of this rank's heads.
        key: as `query`.
        value: as `query`.
        output: RowParallelLinear.

    Source: Shoeybi et al., "Megatron-LM", 2019, section 3.
    """

    _has_compared = False  # inputs are compared over the ranks in the first pass

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group: ProcessGroup,
        *,
        causal: bool = True,
        bias: bool = True,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        rotary_base: float | None = None,
        sequence_parallel: bool = False,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        whole = Attention(
            dim,
            num_heads,
            causal=causal,
            bias=bias,
            num_kv_heads=num_kv_heads,
            dropout=dropout,
            rotary_base=rotary_base,
            dtype=dtype,
            rng=rng,
        )
        self._init_from(whole, group, sequence_parallel)

    @classmethod
    def from_serial(cls, layer: Module, group: ProcessGroup, *, sequence_parallel: bool = False) -> ParallelAttention:
        """Make this rank's layer from an Attention that all ranks have; all call it.

        Raises:
            UsageError: `layer` is no Attention, differs between ranks, or has too few heads.
        """
        made = cls.__new__(cls)
        made._init_from(layer, group, sequence_parallel)
        return made

    def _init_from(self, layer: Module, group: ProcessGroup, sequence_parallel: bool) -> None:
        kind = type(self)
        options = {"sequence_parallel": sequence_parallel}
        whole = check_serial_layer(kind, layer, Attention, group, options)
        # Heads that share keys and values stay together, so these are divided, and the query's heads with them.
        kv_heads = even_sizes(whole.num_kv_heads, group.world_size)
        what = "num_heads" if whole.num_kv_heads == whole.num_heads else "num_kv_heads"
        check_shard_sizes(kind, what, whole.num_kv_heads, kv_heads, group)
        self.dim, self.num_heads, self.num_kv_heads = whole.dim, whole.num_heads, whole.num_kv_heads
        sharing, columns = self.num_heads // self.num_kv_heads, self.dim // self.num_heads
        kv_sizes = [count * columns for count in kv_heads]
        sizes = [count * sharing for count in kv_sizes]
        self.training = whole.training
        self.group = group
        self.causal = whole.causal
        self.rotary_base = whole.rotary_base
        self.sequence_parallel = sequence_parallel
        self._local_kv_heads = kv_heads[group.rank]
        self._local_heads = self._local_kv_heads * sharing
        self.query, self.key, self.value = (
            ColumnParallelLinear.from_serial(part, group, sizes=own, sequence_parallel=sequence_parallel)
            for part, own in ((whole.query, sizes), (whole.key, kv_sizes), (whole.value, kv_sizes))
        )
        self.dropout = None if whole.dropout is None else _dropout_of_rank(whole.dropout, group)
        self.output = RowParallelLinear.from_serial(
            whole.output, group, sizes=sizes, sequence_parallel=sequence_parallel
        )

    def vjp(self, x: Arrays) -> tuple[Array, Pullback]:
        """Map (B, T, dim), or a tuple of it and a mask, to (B, T, dim).

        A mask is that of whole sequences on all ranks, also with sequence_parallel.
        """
        x, mask = self._check(x)
        if not self._has_compared and not self.sequence_parallel:
            check_same_input(self, x, self.group)
            self._has_compared = True
        (query, key, value), pull_parts = column_parallel_matmul(
            x,
            [part.uses() for part in (self.query, self.key, self.value)],
            self.group,
            sequence_parallel=self.sequence_parallel,
        )
        dtype, base, heads, kv_heads = x.dtype, self.rotary_base, self._local_heads, self._local_kv_heads
        length = query.shape[1]
        check_input(self, x, self._expected, fits=length > 0)
        if mask is not None:
            check_mask(self, mask, query.shape[0], length, length)
        if base is not None:
            query, key = rotate(query, heads, base=base), rotate(key, kv_heads, base=base)
        mixed, pull_heads = attend(
            query, key, value, heads, causal=self.causal, num_kv_heads=kv_heads, mask=mask, dropout=self.dropout
        )
        y, pull_output = self.output.vjp(mixed)

        def pullback(grad_y: Array) -> Arrays:
            grad_q, grad_k, grad_v = pull_heads(gradient(pull_output(grad_y)))
            if base is not None:
                with quiet_overflow(dtype):
                    grad_q = rotate(grad_q, heads, base=base, backwards=True).astype(dtype, copy=False)
                    grad_k = rotate(grad_k, kv_heads, base=base, backwards=True).astype(dtype, copy=False)
            grad_x = pull_parts((grad_q, grad_k, grad_v))
            return grad_x if mask is None else (grad_x, None)

        return y, pullback

    def _check(self, x: Arrays) -> tuple[Array, Array | None]:
        """Take an input apart, and check what can be checked before messages."""
        x, mask = input_and_mask(self, x)
        check_dtype(self, x, self.query.weight.dtype)
        check_input(self, x, self._expected, fits=x.ndim == 3 and x.shape[2] == self.dim)
        return x, mask

    @property
    def _expected(self) -> str:
        return f"(B, T >= 1 over all ranks, {self.dim})"

    def __repr__(self) -> str:
        return (
            f"ParallelAttention({self.dim}, {self.num_heads}, {self.group!r}, "
            f"causal={self.causal}, sequence_parallel={self.sequence_parallel})"
        )


def _dropout_of_rank(whole: Dropout, group: ProcessGroup) -> Dropout:
    """Make a Dropout that draws other numbers on each rank, for each has other heads."""
    own = Dropout(whole.p, generator_of_rank(whole.rng, 0, group.rank))
    own.training = whole.training
    return own
