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
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate

from ferro import ProcessGroup, UsageError, Work

from ..nn.arrays import Array, namespace_of, quiet_overflow, wide_dtype
from ..nn.dropout import Dropout
from ..tensor_parallel.sharding import all_gather_along
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
    mask: Array | None = None,
    dropout: Dropout | None = None,
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Compute for each of this rank's positions and each head the mean of all ranks' values, weighted by softmax.

    The results are those of attention in one process. No rank has an array of more than its positions times those of
    another. All ranks call this, and the pullback.

    Args:
        query: (B, t, num_heads * c), this rank's positions.
        key: (B, t, num_kv_heads * c).
        value: of the shape of `key`; its dtype is the result's.
        group: the ranks.
        chunks: the positions of each rank.
        num_heads: heads of the queries, side by side in the columns.
        num_kv_heads: heads of keys and values, a divisor of `num_heads`; each serves as many consecutive heads of the
            queries. None: as many as the queries have.
        causal: whether a position attends only to itself and the positions before it.
        mask: (B, t), True for this rank's positions to which all positions attend, False for padding. A position that
            sees no key gets zeros.
        dropout: sets some weights to zero, in training.

    Returns:
        The heads' outputs side by side, of the shape of `query`; and a function from their gradient to the gradients
        of query, key and value, each in the dtype of its array.

    Raises:
        UsageError: shapes do not fit; nothing was sent.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    _check(query, key, value, mask, num_heads, kv_heads, chunks.size(group.rank))
    xp, wide = namespace_of(query), wide_dtype(query.dtype)
    scale = 1 / math.sqrt(query.shape[2] // num_heads)
    ring = _Ring(group, chunks, causal, _gathered(mask, group, chunks))
    q = _query_heads(query.astype(wide, copy=False) * scale, num_heads, kv_heads)
    own = _stacked(key, value, mask)
    # The pullback draws the weights that become zero again, in the same order of blocks.
    redrawn = deepcopy(dropout)
    softmax = _RunningSoftmax(q)
    for owner, travelling in ring.forward(own):
        k, v = (_kv_heads(part.astype(wide, copy=False), kv_heads) for part in travelling)
        for block in ring.blocks(owner):
            scores = block.scores(q, k)
            drop = None if dropout is None else dropout.draw(xp, scores.shape)
            softmax.add(block.rows, scores, v[..., block.columns, :], drop)
    mixed, log_sums = softmax.result()
    shape, dtypes = query.shape, (query.dtype, key.dtype, value.dtype)

    def pull(grad_mixed: Array) -> tuple[Array, Array, Array]:
        grad = _query_heads(grad_mixed.astype(wide, copy=False), num_heads, kv_heads)
        # The gradient through softmax is weights * (d - sum(weights * d)), d being that of the weights. The sum over
        # keys equals the sum of grad * mixed over columns.
        sums = xp.einsum("bgrtc,bgrtc->bgrt", grad, mixed)[..., None]
        grad_q = xp.zeros_like(q)
        complete = xp.zeros(own.shape, wide)
        again = deepcopy(redrawn)
        for owner, travelling, grads in ring.backward(own, complete):
            complete = grads
            k, v = (_kv_heads(part.astype(wide, copy=False), kv_heads) for part in travelling)
            grad_k, grad_v = (_kv_heads(part, kv_heads) for part in grads)
            for block in ring.blocks(owner):
                rows, columns = block.rows, block.columns
                weights = xp.exp(block.scores(q, k) - log_sums[..., rows, :])
                drop = None if again is None else again.draw(xp, weights.shape)
                d = grad[..., rows, :]
                kept = weights if drop is None else drop(weights)
                grad_v[..., columns, :] += (kept.swapaxes(3, 4) @ d).sum(axis=2, keepdims=True)
                grad_weights = d @ v[..., columns, :].swapaxes(3, 4)
                weights *= (grad_weights if drop is None else drop(grad_weights)) - sums[..., rows, :]
                grad_q[..., rows, :] += weights @ k[..., columns, :]
                grad_k[..., columns, :] += (weights.swapaxes(3, 4) @ q[..., rows, :]).sum(axis=2, keepdims=True)
        grad_q *= scale
        with quiet_overflow(dtypes[2]):
            return (
                _columns(grad_q, shape).astype(dtypes[0], copy=False),
                complete[0].astype(dtypes[1], copy=False),
                complete[1].astype(dtypes[2], copy=False),
            )

    with quiet_overflow(dtypes[2]):
        return _columns(mixed, shape).astype(dtypes[2], copy=False), pull


@dataclass(frozen=True, slots=True)
class _Block:
    """Some of this rank's queries and of the keys at hand, of which they see some.

    Attributes:
        rows: positions of the queries, within this rank's.
        columns: positions of the keys, within their owner's.
        triangular: whether both are the same positions, and a row sees the columns up to its own.
        mask: (B, columns), True for keys that are seen; None: all are.
    """

    rows: slice
    columns: slice
    triangular: bool
    mask: Array | None

    def scores(self, q: Array, k: Array) -> Array:
        """Multiply queries (B, G, R, t, c) by keys (B, G, 1, s, c); -inf where a row does not see a column."""
        scores: Array = q[..., self.rows, :] @ k[..., self.columns, :].swapaxes(3, 4)
        xp = namespace_of(scores)
        if self.triangular:
            xp.copyto(scores, -math.inf, where=xp.triu(xp.ones(scores.shape[-2:], bool), 1))
        if self.mask is not None:
            xp.copyto(scores, -math.inf, where=~self.mask[:, None, None, None])
        return scores


@dataclass(frozen=True, slots=True)
class _Ring:
    """The order in which keys and values pass a rank, and the blocks of scores that it computes."""

    group: ProcessGroup
    chunks: SequenceChunks
    causal: bool
    masks: list[Array] | None  # of each rank's keys

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

    def blocks(self, owner: int) -> Iterator[_Block]:
        """Yield the blocks in which this rank's queries see the owner's keys.

        Once keys and gradients are back at their owner (-1), there is none.
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
                mask = None if self.masks is None else self.masks[owner][:, columns]
                yield _Block(rows, columns, self.causal and k_start == q_start, mask)

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

    def add(self, rows: slice, scores: Array, v: Array, drop: Callable[[Array], Array] | None) -> None:
        """Add a block: scores (B, G, R, rows, keys), which are overwritten, and values (B, G, 1, keys, c)."""
        xp = namespace_of(scores)
        before = self._greatest[..., rows, :]
        greatest = xp.maximum(before, scores.max(axis=-1, keepdims=True))
        finite = xp.where(greatest == -math.inf, scores.dtype.type(0), greatest)  # a row may have seen no key yet
        kept = xp.exp(before - finite)
        scores -= finite
        xp.exp(scores, out=scores)
        self._greatest[..., rows, :] = greatest
        self._total[..., rows, :] = self._total[..., rows, :] * kept + scores.sum(axis=-1, keepdims=True)
        weights = scores if drop is None else drop(scores)
        self._sum[..., rows, :] = self._sum[..., rows, :] * kept + weights @ v

    def result(self) -> tuple[Array, Array]:
        """The means, and the logarithm of the sum of all exponentials of each query's scores; infinite without keys."""
        xp = namespace_of(self._total)
        seen = self._total > 0
        total = xp.where(seen, self._total, self._total.dtype.type(1))
        log_sums = xp.where(seen, xp.log(total) + self._greatest, self._total.dtype.type(math.inf))
        return self._sum / total, log_sums


def _gathered(mask: Array | None, group: ProcessGroup, chunks: SequenceChunks) -> list[Array] | None:
    """All ranks' masks."""
    if mask is None:
        return None
    xp = namespace_of(mask)
    whole = all_gather_along(mask, group, 1, chunks.sizes)
    masks: list[Array] = xp.split(whole, list(accumulate(chunks.sizes))[:-1], axis=1)
    return masks


def _stacked(key: Array, value: Array, mask: Array | None) -> Array:
    """Put keys and values into one array, which travels, in the wider of their dtypes."""
    xp = namespace_of(key)
    dtype = key.dtype if key.dtype == value.dtype else wide_dtype(key.dtype)
    if mask is not None:
        # What stands at padding has no effect, even if it is NaN.
        key, value = (xp.where(mask[:, :, None], part, part.dtype.type(0)) for part in (key, value))
    stacked: Array = xp.stack((key.astype(dtype, copy=False), value.astype(dtype, copy=False)))
    return stacked


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


def _check(
    query: Array, key: Array, value: Array, mask: Array | None, num_heads: int, kv_heads: int, size: int
) -> None:
    fits = query.ndim == key.ndim == 3 and key.shape == value.shape and query.shape[:2] == key.shape[:2]
    fits = fits and num_heads > 0 and kv_heads > 0 and num_heads % kv_heads == 0 and query.shape[2] % num_heads == 0
    if not fits or key.shape[2] * num_heads != query.shape[2] * kv_heads:
        raise UsageError(
            f"ring_attend: {num_heads} heads of queries and {kv_heads} of keys and values do not fit query "
            f"{query.shape}, key {key.shape} and value {value.shape}."
        )
    if query.shape[1] != size:
        raise UsageError(f"ring_attend: this rank has {size} positions of the sequences, got {query.shape[1]}.")
    if mask is not None and (mask.shape != query.shape[:2] or mask.dtype != bool):
        raise UsageError(
            f"ring_attend: the mask must be boolean, {query.shape[:2]}, got {mask.dtype} {mask.shape}. Masks for pairs "
            "of positions are not divided."
        )
    if query.dtype.kind in "iubc" or query.dtype != key.dtype or wide_dtype(value.dtype) != wide_dtype(key.dtype):
        raise UsageError(
            f"ring_attend: query, key and value must have one real dtype, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}."
        )
