"""PowerSGD: send each gradient matrix as a product of two thin ones.

A matrix M (n, m) of a gradient is approximated by P @ Q.T with P (n, r) and Q (m, r), of which
only P and Q are sent: r * (n + m) elements for n * m. One step of subspace iteration a training
step, begun from the last step's Q, is enough, because gradients change slowly.

    1  M += error                          what earlier steps left out       (error feedback)
    2  P = M @ Q;    mean over ranks       sent while the backward pass goes on
    3  P = orthonormal basis of P
    4  Q = M.T @ P;  mean over ranks       sent when the bucket is waited for
    5  error = M - P @ Q.T;  M = P @ Q.T

Source: Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization", 2019 (arXiv:1905.13727), algorithms 1 and 2. Unlike there, step 3 is a
Householder QR, which needs no epsilon where P is rank-deficient, or zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ferro import ProcessGroup, UsageError

from ..ddp.bucket import GradBucket, Pending
from ..nn.arrays import Array, namespace_of
from .averaging import mean


class PowerSGD:
    """A communication hook with state: make one for each DDP module, alike on every rank.

    Gradients of at least two dimensions are matrices of shape (first dimension, all others),
    compressed where that halves them at least; others are averaged exactly. The result is the
    best of rank `rank` that one iteration finds, and exact where the mean gradient and all
    ranks' gradients lie in that many dimensions. Half precision is compressed in float32.

    Args:
        rank: columns of P and Q.
        warm_start: begin from the last step's Q, instead of a random one.
        error_feedback: add to each gradient what earlier steps left out, so that it is sent in
            time; keeps one more array of the compressed gradients' size.
        start_after: average the first so many steps exactly, while gradients change fast.
        seed: for the first Q, the same on every rank.
    """

    def __init__(
        self,
        rank: int = 1,
        *,
        warm_start: bool = True,
        error_feedback: bool = True,
        start_after: int = 0,
        seed: int = 0,
    ) -> None:
        if rank < 1:
            raise UsageError(f"PowerSGD: rank must be at least 1, not {rank}.")
        if start_after < 0:
            raise UsageError(f"PowerSGD: start_after must be at least 0, not {start_after}.")
        self.rank = rank
        self.warm_start = warm_start
        self.error_feedback = error_feedback
        self.start_after = start_after
        self.seed = seed
        self._states: dict[int, _State] = {}

    def __call__(self, bucket: GradBucket, group: ProcessGroup) -> Pending:
        """Begin to average a bucket: steps 1 and 2."""
        state = self._state(bucket)
        state.steps += 1
        if state.steps <= self.start_after or not state.matrices:
            return mean(bucket, group)
        if state.steps > 1 and not self.warm_start:
            state.draw()
        return _Compressed(state, bucket, group)

    def _state(self, bucket: GradBucket) -> _State:
        state = self._states.get(bucket.index)
        if state is None:
            rng = np.random.default_rng((self.seed, bucket.index))
            state = _State(bucket, self.rank, rng, error_feedback=self.error_feedback)
            self._states[bucket.index] = state
        elif state.names != bucket.names:
            raise UsageError(
                f"PowerSGD: bucket {bucket.index} holds other parameters than before "
                f"({bucket.names[0]!r}, …): make one PowerSGD for each DDP module."
            )
        return state


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """One compressed gradient: its number in the bucket, and its parts of the state."""

    index: int
    p: Array
    q: Array
    error: Array | None


class _State:
    """What is kept for a bucket from step to step.

    Attributes:
        names: parameters in the bucket.
        steps: how many there have been.
        ps, qs: all P and all Q, each in one piece, as they are sent.
        matrices: the gradients to compress.
        vectors: numbers of the other gradients.
    """

    def __init__(
        self, bucket: GradBucket, rank: int, rng: np.random.Generator, *, error_feedback: bool
    ) -> None:
        xp = namespace_of(bucket.buffer)
        self.names = bucket.names
        self.steps = 0
        shapes = {
            index: (grad.shape[0], grad.size // grad.shape[0])
            for index, grad in enumerate(bucket.grads)
            if _worthwhile(grad, rank)
        }
        ranks = {index: min(rank, *shape) for index, shape in shapes.items()}
        dtype = _wide(bucket.buffer.dtype)
        self.ps = xp.empty(sum(n * ranks[i] for i, (n, _) in shapes.items()), dtype)
        self.qs = xp.empty(sum(m * ranks[i] for i, (_, m) in shapes.items()), dtype)
        ps = _pieces(self.ps, [(n, ranks[i]) for i, (n, _) in shapes.items()])
        qs = _pieces(self.qs, [(m, ranks[i]) for i, (_, m) in shapes.items()])
        self.matrices = [
            _Matrix(
                index=index,
                p=p,
                q=q,
                error=xp.zeros(shapes[index], dtype) if error_feedback else None,
            )
            for index, p, q in zip(shapes, ps, qs, strict=True)
        ]
        self.vectors = [index for index in range(len(bucket.grads)) if index not in shapes]
        self._rng = rng
        self.draw()

    def draw(self) -> None:
        """Draw every Q anew, the same on every rank."""
        drawn = self._rng.standard_normal(self.qs.size).astype(self.qs.dtype)
        self.qs[...] = namespace_of(self.qs).asarray(drawn)


class _Compressed:
    """A bucket on its way."""

    def __init__(self, state: _State, bucket: GradBucket, group: ProcessGroup) -> None:
        self._state = state
        self._bucket = bucket
        self._group = group
        xp = namespace_of(bucket.buffer)
        for matrix in state.matrices:
            grad = self._grad(matrix)
            if matrix.error is not None:
                grad += matrix.error.astype(grad.dtype, copy=False)
            xp.matmul(grad.astype(state.ps.dtype, copy=False), matrix.q, out=matrix.p)
        self._works = [group.all_reduce(state.ps, "mean", out=state.ps, async_op=True)]
        if state.vectors:
            flat = xp.concatenate([bucket.grads[index].reshape(-1) for index in state.vectors])
            self._works.append(group.all_reduce(flat, "mean", out=flat, async_op=True))

    def wait(self) -> None:
        """Do steps 3 to 5."""
        state = self._state
        xp = namespace_of(state.ps)
        self._works[0].wait()
        for matrix in state.matrices:
            matrix.p[...] = xp.linalg.qr(matrix.p)[0]
            grad = self._grad(matrix).astype(state.qs.dtype, copy=False)
            xp.matmul(grad.T, matrix.p, out=matrix.q)
        self._group.all_reduce(state.qs, "mean", out=state.qs)
        for matrix in state.matrices:
            grad = self._grad(matrix)
            product = matrix.p @ matrix.q.T
            if matrix.error is not None:
                xp.subtract(grad, product, out=matrix.error)
            grad[...] = product
        if state.vectors:
            flat = self._works[1].wait()
            grads = [self._bucket.grads[index] for index in state.vectors]
            for grad, piece in zip(grads, _pieces(flat, [g.shape for g in grads]), strict=True):
                grad[...] = piece

    def _grad(self, matrix: _Matrix) -> Array:
        grad = self._bucket.grads[matrix.index]
        return grad.reshape(grad.shape[0], -1)


def _worthwhile(grad: Array, rank: int) -> bool:
    """Whether a gradient is a real matrix of which compression leaves half at most."""
    if grad.ndim < 2 or grad.size == 0 or grad.dtype.kind == "c":
        return False
    n, m = grad.shape[0], grad.size // grad.shape[0]
    return bool(2 * min(rank, n, m) * (n + m) <= n * m)


def _wide(dtype: np.dtype) -> np.dtype:
    """Return the dtype to compute in: linear algebra knows no half precision."""
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


def _pieces(flat: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return [
        flat[end - int(np.prod(shape)) : end].reshape(shape)
        for end, shape in zip(ends.tolist(), shapes, strict=True)
    ]
