"""ParallelAttention: self-attention with the heads divided over the ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, UsageError
from ferro.collectives.partition import even_sizes

from ..nn.arrays import Array, Rng
from ..nn.attention import Attention, attend
from ..nn.checks import check_dtype, check_input
from ..nn.module import Module, Pullback
from .column import ColumnParallelLinear, column_parallel_matmul
from .conversion import check_serial_layer, check_shard_sizes
from .row import RowParallelLinear


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

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group: ProcessGroup,
        *,
        causal: bool = True,
        bias: bool = True,
        sequence_parallel: bool = False,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        whole = Attention(dim, num_heads, causal=causal, bias=bias, dtype=dtype, rng=rng)
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
        if whole.num_kv_heads != whole.num_heads or whole.dropout is not None or whole.rotary_base is not None:
            raise UsageError(
                f"{kind.__name__}: {whole!r} has options that are not divided over ranks: num_kv_heads, dropout or "
                "rotary_base. Leave it out of the plan; every rank then computes all of its heads."
            )
        heads = even_sizes(whole.num_heads, group.world_size)
        check_shard_sizes(kind, "num_heads", whole.num_heads, heads, group)
        self._dim = whole.query.weight.data.shape[0]
        sizes = [count * (self._dim // whole.num_heads) for count in heads]
        self.training = whole.training
        self.group = group
        self.num_heads = whole.num_heads
        self.causal = whole.causal
        self.sequence_parallel = sequence_parallel
        self._local_heads = heads[group.rank]
        self.query, self.key, self.value = (
            ColumnParallelLinear.from_serial(part, group, sizes=sizes, sequence_parallel=sequence_parallel)
            for part in (whole.query, whole.key, whole.value)
        )
        self.output = RowParallelLinear.from_serial(
            whole.output, group, sizes=sizes, sequence_parallel=sequence_parallel
        )

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (B, T, dim) to (B, T, dim)."""
        check_dtype(self, x, self.query.weight.data.dtype)
        expected = f"(B, T >= 1 over all ranks, {self._dim})"
        check_input(self, x, expected, fits=x.ndim == 3 and x.shape[2] == self._dim)
        parts, pull_parts = column_parallel_matmul(
            x,
            [part.uses() for part in (self.query, self.key, self.value)],
            self.group,
            sequence_parallel=self.sequence_parallel,
        )
        query, key, value = parts
        check_input(self, x, expected, fits=query.shape[1] > 0)
        mixed, pull_heads = attend(query, key, value, self._local_heads, causal=self.causal)
        y, pull_output = self.output.vjp(mixed)

        def pullback(grad_y: Array) -> Array:
            grad_mixed = pull_output(grad_y)
            assert grad_mixed is not None, "a linear map has a gradient"
            return pull_parts(pull_heads(grad_mixed))

        return y, pullback

    def __repr__(self) -> str:
        return (
            f"ParallelAttention({self._dim}, {self.num_heads}, {self.group!r}, "
            f"causal={self.causal}, sequence_parallel={self.sequence_parallel})"
        )
