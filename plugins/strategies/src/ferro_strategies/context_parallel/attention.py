"""RingAttention: self-attention over sequences whose positions are divided over the ranks."""

from __future__ import annotations

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, namespace_of, quiet_overflow
from ..nn.attention import Attention, gradient, input_and_mask
from ..nn.checks import check_input
from ..nn.module import Module, Pullback
from ..nn.rotary import rotate
from ..nn.trees import Arrays
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
        query, key, value, output, dropout: those of `layer`.
    """

    def __init__(self, layer: Attention, group: ProcessGroup, *, zigzag: bool = True) -> None:
        self.training = layer.training
        self.group = group
        self.zigzag = zigzag
        self.dim, self.num_heads, self.num_kv_heads = layer.dim, layer.num_heads, layer.num_kv_heads
        self.causal = layer.causal
        self.rotary_base = layer.rotary_base
        self.query, self.key, self.value = layer.query, layer.key, layer.value
        self.output = layer.output
        self.dropout = layer.dropout

    def vjp(self, x: Arrays) -> tuple[Array, Pullback]:
        """Map (B, t, dim), or a tuple of it and a mask (B, t), to (B, t, dim).

        Raises:
            UsageError: the ranks' positions are not those of a sequence that `SequenceChunks` divides.
        """
        x, mask = self._check(x)
        chunks = self._chunks(x)
        (query, pull_query), (key, pull_key), (value, pull_value) = (
            part.vjp(x) for part in (self.query, self.key, self.value)
        )
        dtype, heads, kv_heads = x.dtype, self.num_heads, self.num_kv_heads
        if self.rotary_base is not None:
            query, key = self._rotate(query, heads, chunks), self._rotate(key, kv_heads, chunks)
        mixed, pull_heads = ring_attend(
            query,
            key,
            value,
            self.group,
            chunks,
            num_heads=heads,
            num_kv_heads=kv_heads,
            causal=self.causal,
            mask=mask,
            dropout=self.dropout,
        )
        y, pull_output = self.output.vjp(mixed)

        def pullback(grad_y: Array) -> Arrays:
            grad_query, grad_key, grad_value = pull_heads(gradient(pull_output(grad_y)))
            if self.rotary_base is not None:
                with quiet_overflow(dtype):
                    grad_query = self._rotate(grad_query, heads, chunks, backwards=True).astype(dtype, copy=False)
                    grad_key = self._rotate(grad_key, kv_heads, chunks, backwards=True).astype(dtype, copy=False)
            grad_x = gradient(pull_query(grad_query))
            for pull, grad in ((pull_key, grad_key), (pull_value, grad_value)):
                grad_x = grad_x + gradient(pull(grad))
            return grad_x if mask is None else (grad_x, None)

        return y, pullback

    def _check(self, x: Arrays) -> tuple[Array, Array | None]:
        """Take an input apart, and check it."""
        x, mask = input_and_mask(self, x)
        namespace_of(x)
        check_input(self, x, f"(B, t, {self.dim})", fits=x.ndim == 3 and x.shape[2] == self.dim)
        return x, mask

    def _rotate(self, x: Array, heads: int, chunks: SequenceChunks, *, backwards: bool = False) -> Array:
        """Turn each chunk by the places of its positions in the sequence."""
        assert self.rotary_base is not None, "the caller has checked it"
        parts, start = [], 0
        for first, stop in chunks.spans(self.group.rank):
            part = x[:, start : start + stop - first]
            parts.append(rotate(part, heads, base=self.rotary_base, first=first, backwards=backwards))
            start += stop - first
        whole: Array = namespace_of(x).concatenate(parts, axis=1)
        return whole

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
