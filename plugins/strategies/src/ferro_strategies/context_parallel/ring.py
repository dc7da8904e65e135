"""Ring attention: keys and values travel around the ranks, each of which keeps its queries.

With n ranks there are n steps. In each, a rank attends with its queries to the keys and values that it has at hand,
while it sends them to the next rank and receives those of the rank before:

    step      rank 0     rank 1     rank 2
    0         kv of 0    kv of 1    kv of 2
    1         kv of 2    kv of 0    kv of 1
    2         kv of 1    kv of 2    kv of 0

The softmax over all keys is put together from those of the steps: a maximum, a sum and a mean are kept for each query,
in float32 for half precision. In the backward pass keys and values travel once more, and with them their gradients, to
which each rank adds; one more step brings these back to the rank whose keys they are.

Source: Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023; the
running softmax is from Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, and the pullback from
Dao et al., "FlashAttention", 2022, appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ferro import ProcessGroup, UsageError, Work

from ..nn.arrays import Array, namespace_of, wide_dtype
from .chunks import SequenceChunks


def ring_attend(
    query: Array,
    key: Array,
    value: Array,
    group: ProcessGroup,
    chunks: SequenceChunks,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    causal: bool,
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Compute for each of this rank's positions and each head the mean of all ranks' values, weighted by softmax.

    The results are those of attention in one process. No rank has an array of more than its positions times those of
    another. All ranks call this, and the pullback.

    Args:
        query: (B, t, num_heads * c), this rank's positions.
        key: (B, t, num_kv_heads * c).
        value: of the shape of `key`.
        group: the ranks.
        chunks: the positions of each rank.
        num_heads: heads of the queries, side by side in the columns.
        num_kv_heads: heads of keys and values, a divisor of `num_heads`; each serves as many consecutive heads of the
            queries. None: as many as the queries have.
        causal: whether a position attends only to itself and the positions before it.

    Returns:
        The heads' outputs side by side, of the shape of `query`; and a function from their gradient to the gradients
        of query, key and value.

    Raises:
        UsageError: shapes do not fit; nothing was sent.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    _check(query, key, value, num_heads, kv_heads, chunks.size(group.rank))
    xp, wide = namespace_of(query), wide_dtype(query.dtype)
    scale = 1 / math.sqrt(query.shape[2] // num_heads)
    ring = _Ring(group, chunks, causal)
    own = xp.stack((key, value))
    q = _query_heads(query.astype(wide, copy=False) * scale, num_heads, kv_heads)
    softmax = _RunningSoftmax(q)
    for owner, travelling in ring.forward(own):
        k, v = (_kv_heads(part.astype(wide, copy=False), kv_heads) for part in travelling)
        for rows, columns, triangular in ring.blocks(owner):
            softmax.add(rows, _scores(q[..., rows, :], k[..., columns, :], triangular), v[..., columns, :])
    mixed, log_sums = softmax.result()
    shape, dtype = query.shape, query.dtype

    def pull(grad_mixed: Array) -> tuple[Array, Array, Array]:
        grad = _query_heads(grad_mixed.astype(wide, copy=False), num_heads, kv_heads)
        # The gradient through softmax is weights * (d - sum(weights * d)), d being that of the weights. The sum over
        # keys equals the sum of grad * mixed over columns.
        sums = xp.einsum("bgrtc,bgrtc->bgrt", grad, mixed)[..., None]
        grad_q = xp.zeros_like(q)
        complete = xp.zeros(own.shape, wide)
        for owner, travelling, grads in ring.backward(own, complete):
            complete = grads
            k, v = (_kv_heads(part.astype(wide, copy=False), kv_heads) for part in travelling)
            grad_k, grad_v = (_kv_heads(part, kv_heads) for part in grads)
            for rows, columns, triangular in ring.blocks(owner):
                q_rows, k_columns, d = q[..., rows, :], k[..., columns, :], grad[..., rows, :]
                weights = xp.exp(_scores(q_rows, k_columns, triangular) - log_sums[..., rows, :])
                grad_v[..., columns, :] += (weights.swapaxes(3, 4) @ d).sum(axis=2, keepdims=True)
                weights *= d @ v[..., columns, :].swapaxes(3, 4) - sums[..., rows, :]
                grad_q[..., rows, :] += weights @ k_columns
                grad_k[..., columns, :] += (weights.swapaxes(3, 4) @ q_rows).sum(axis=2, keepdims=True)
        grad_q *= scale
        grad_key, grad_value = complete.astype(dtype, copy=False)
        return _columns(grad_q, shape).astype(dtype, copy=False), grad_key, grad_value

    return _columns(mixed, shape).astype(dtype, copy=False), pull


@dataclass(frozen=True, slots=True)
class _Ring:
    """The order in which keys and values pass a rank, and the blocks of scores that it computes."""

    group: ProcessGroup
    chunks: SequenceChunks
    causal: bool

    def forward(self, own: Array) -> Iterator[tuple[int, Array]]:
        """Yield (owner, keys and values) n times; the next ones are under way while the caller computes."""
        n, rank = self.group.world_size, self.group.rank
        held = own
        for step in range(n):
            owner = (rank - step) % n
            moving = self._pass_on(held, (owner - 1) % n) if step < n - 1 else None
            yield owner, held
            if moving is not None:
                held = moving.wait()

    def backward(self, own: Array, grads: Array) -> Iterator[tuple[int, Array, Array]]:
        """Yield (owner, keys and values, their gradients) n times, and last this rank's own, whose sums are complete.

        The caller adds to the gradients in place; the last time there is nothing to add.
        """
        n, rank = self.group.world_size, self.group.rank
        held = own
        for step in range(n):
            owner = (rank - step) % n
            moving = self._pass_on(held, (owner - 1) % n) if step < n - 1 else None
            yield owner, held, grads
            grads = self._pass_on(grads, (owner - 1) % n).wait()
            if moving is not None:
                held = moving.wait()
        yield -1, own, grads

    def blocks(self, owner: int) -> Iterator[tuple[slice, slice, bool]]:
        """Yield (rows, columns, triangular) of the blocks in which this rank's queries see the owner's keys.

        In a triangular block, where rows and columns are the same positions, a row sees the columns up to its own. Once
        keys and gradients are back at their owner (-1), there is no block.
        """
        if owner < 0:
            return
        row_start = 0
        for q_start, q_stop in self.chunks.spans(self.group.rank):
            rows = slice(row_start, row_start + q_stop - q_start)
            row_start, column_start = rows.stop, 0
            for k_start, k_stop in self.chunks.spans(owner):
                columns = slice(column_start, column_start + k_stop - k_start)
                column_start = columns.stop
                empty = q_start == q_stop or k_start == k_stop
                if empty or (self.causal and k_start > q_start):
                    continue
                yield rows, columns, self.causal and k_start == q_start

    def _pass_on(self, held: Array, next_owner: int) -> Work[Array]:
        n, rank = self.group.world_size, self.group.rank
        copies, batch, _, columns = held.shape
        received = namespace_of(held).empty((copies, batch, self.chunks.size(next_owner), columns), held.dtype)
        work: Work[Array] = self.group.sendrecv(
            held, received, (rank + 1) % n, (rank - 1) % n, async_op=True, copy=False
        )
        return work


class _RunningSoftmax:
    """The mean of values weighted by softmax, of which the scores arrive block by block.

    Args:
        q: the queries, (B, G, R, t, c), for the shape and dtype.
    """

    def __init__(self, q: Array) -> None:
        xp = namespace_of(q)
        self._greatest = xp.full((*q.shape[:-1], 1), -math.inf, q.dtype)
        self._total = xp.zeros((*q.shape[:-1], 1), q.dtype)
        self._sum = xp.zeros(q.shape, q.dtype)

    def add(self, rows: slice, scores: Array, v: Array) -> None:
        """Add a block: scores (B, G, R, rows, keys), which are overwritten, and values (B, G, 1, keys, c)."""
        xp = namespace_of(scores)
        before = self._greatest[..., rows, :]
        greatest = xp.maximum(before, scores.max(axis=-1, keepdims=True))
        kept = xp.exp(before - greatest)
        scores -= greatest
        xp.exp(scores, out=scores)
        self._greatest[..., rows, :] = greatest
        self._total[..., rows, :] = self._total[..., rows, :] * kept + scores.sum(axis=-1, keepdims=True)
        self._sum[..., rows, :] = self._sum[..., rows, :] * kept + scores @ v

    def result(self) -> tuple[Array, Array]:
        """The means, and the logarithm of the sum of all exponentials of each query's scores."""
        log_sums: Array = namespace_of(self._total).log(self._total) + self._greatest
        return self._sum / self._total, log_sums


def _scores(q: Array, k: Array, triangular: bool) -> Array:
    """Multiply queries (B, G, R, t, c) by keys (B, G, 1, s, c); -inf where a row does not see a column."""
    scores: Array = q @ k.swapaxes(3, 4)
    if triangular:
        xp, size = namespace_of(scores), scores.shape[-1]
        scores += xp.triu(xp.full((size, size), -math.inf, scores.dtype), 1)
    return scores


def _query_heads(x: Array, num_heads: int, kv_heads: int) -> Array:
    """View (B, t, columns) as (B, kv_heads, heads that share keys, t, columns of a head)."""
    batch, length, columns = x.shape
    heads: Array = x.reshape(batch, length, kv_heads, num_heads // kv_heads, columns // num_heads)
    return heads.transpose(0, 2, 3, 1, 4)


def _kv_heads(x: Array, kv_heads: int) -> Array:
    """View (B, t, columns) as (B, kv_heads, 1, t, columns of a head)."""
    return _query_heads(x, kv_heads, kv_heads)


def _columns(x: Array, shape: tuple[int, ...]) -> Array:
    """Put heads side by side again: the inverse of `_query_heads`."""
    return x.transpose(0, 3, 1, 2, 4).reshape(shape)


def _check(query: Array, key: Array, value: Array, num_heads: int, kv_heads: int, size: int) -> None:
    fits = query.ndim == key.ndim == 3 and key.shape == value.shape and query.shape[:2] == key.shape[:2]
    fits = fits and num_heads > 0 and kv_heads > 0 and num_heads % kv_heads == 0 and query.shape[2] % num_heads == 0
    if not fits or key.shape[2] * num_heads != query.shape[2] * kv_heads:
        raise UsageError(
            f"ring_attend: {num_heads} heads of queries and {kv_heads} of keys and values do not fit query "
            f"{query.shape}, key {key.shape} and value {value.shape}."
        )
    if query.shape[1] != size:
        raise UsageError(f"ring_attend: this rank has {size} positions of the sequences, got {query.shape[1]}.")
    if not query.dtype == key.dtype == value.dtype or query.dtype.kind in "iubc":
        raise UsageError(
            f"ring_attend: query, key and value must have one real dtype, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}."
        )
