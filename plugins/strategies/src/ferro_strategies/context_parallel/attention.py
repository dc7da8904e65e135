"""RingAttention: self-attention over sequences whose positions are divided over the ranks."""

from __future__ import annotations

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array
from ..nn.attention import Attention
from ..nn.checks import check_input
from ..nn.module import Module, Pullback
from ..tensor_parallel.sharding import all_gather_sizes
from .chunks import SequenceChunks
from .ring import ring_attend


class RingAttention(Module):
    """`nn.Attention` for this rank's positions (B, t, dim), which attend to those of all ranks.

    Output and input's gradient are those of the whole sequences in one process; gradients of the parameters are this
    rank's terms, which `ContextParallel` averages over the ranks.

    Args:
        layer: the attention whose maps are used, as the same objects.
        group: the ranks.
        zigzag: see SequenceChunks.

    Attributes:
        query, key, value, output: those of `layer`.
    """

    def __init__(self, layer: Attention, group: ProcessGroup, *, zigzag: bool = True) -> None:
        self.training = layer.training
        self.group = group
        self.zigzag = zigzag
        self.dim = layer.dim
        self.num_heads = layer.num_heads
        self.causal = layer.causal
        self.query, self.key, self.value = layer.query, layer.key, layer.value
        self.output = layer.output

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (B, t, dim) to (B, t, dim).

        Raises:
            UsageError: the ranks' positions are not those of a sequence that `SequenceChunks` divides.
        """
        check_input(self, x, f"(B, t, {self.dim})", fits=x.ndim == 3 and x.shape[2] == self.dim)
        chunks = self._chunks(x)
        (query, pull_query), (key, pull_key), (value, pull_value) = (
            part.vjp(x) for part in (self.query, self.key, self.value)
        )
        mixed, pull_heads = ring_attend(
            query, key, value, self.group, chunks, num_heads=self.num_heads, causal=self.causal
        )
        y, pull_output = self.output.vjp(mixed)

        def pullback(grad_y: Array) -> Array:
            grad_query, grad_key, grad_value = pull_heads(_gradient(pull_output(grad_y)))
            grad_x = _gradient(pull_query(grad_query)) + _gradient(pull_key(grad_key))
            grad_x += _gradient(pull_value(grad_value))
            return grad_x

        return y, pullback

    def _chunks(self, x: Array) -> SequenceChunks:
        sizes = all_gather_sizes(x.shape[1], self.group, x)
        chunks = SequenceChunks(sum(sizes), self.group.world_size, self.zigzag)
        if chunks.sizes != sizes or chunks.length == 0:
            raise UsageError(
                f"{self!r}: the ranks have {sizes} positions, which is no division of {chunks.length} positions by "
                "SequenceChunks. Run the layer within ContextParallel, with the same sequences on all ranks."
            )
        return chunks

    def __repr__(self) -> str:
        return f"RingAttention({self.dim}, {self.num_heads}, {self.group!r}, causal={self.causal})"


def _gradient(grad: Array | None) -> Array:
    assert grad is not None, "linear maps have gradients"
    return grad
