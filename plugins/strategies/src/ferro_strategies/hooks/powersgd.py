"""PowerSGD: send each gradient matrix as a product of two thin ones.

PowerSGD approximates a gradient matrix M (n, m) by P @ Q.T with P (n, r) and Q (m, r), and sends
only P and Q: r * (n + m) elements instead of n * m. One step of subspace iteration in each
training step, begun from the last step's Q, is enough, because gradients change slowly.

    1  M += error                          add what earlier steps left out   (error feedback)
    2  P = M @ Q;    mean over ranks       sent while the backward pass goes on
    3  P = orthonormal basis of P
    4  Q = M.T @ P;  mean over ranks       sent when the bucket is waited for
    5  error = M - P @ Q.T;  M = P @ Q.T

Source: Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization", 2019 (arXiv:1905.13727), algorithms 1 and 2. Unlike the paper, step 3
is a Householder QR, which needs no epsilon where P is rank-deficient or zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ferro import ProcessGroup, UsageError

from ..ddp.bucket import GradBucket, Pending
from ..nn.arrays import Array, namespace_of, wide_dtype
from .averaging import mean


class PowerSGD:
    """A communication hook with state: make one for each DDP module, the same on every rank.

    Gradients of at least two dimensions are matrices of shape (first dimension, all others). They are compressed where
    compression at least halves their size; other gradients are averaged exactly. The result is the best matrix of rank
    `rank` that one iteration finds. It is exact where the mean gradient and all ranks' gradients span at most `rank`
    dimensions. Half precision is compressed in float32.

    Args:
        rank: number of columns of P and Q.
        warm_start: begin from the last step's Q, and not from a random one.
        error_feedback: add to each gradient the part that earlier steps left out; takes one more
            array of the compressed gradients' size.
        start_after: number of first steps that average exactly, while gradients change fast.
        seed: seed of the first Q, the same on every rank.

    Attributes:
        checkpoint_values_by_rank: True: in a checkpoint, each rank has a state of its own. Of it, the steps and every Q
            are the same on all ranks, and a rank that is new has them, too; the errors are its own.
    """

    checkpoint_values_by_rank: ClassVar[bool] = True

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
        self._states: dict[int, _BucketState] = {}
        self._loaded: dict[str, Array | str] = {}  # the states of buckets that were not there yet

    def state_dict(self) -> dict[str, Array | str]:
        """Copy steps, every Q, errors and the random generators' states; each rank saves its own."""
        found = dict(self._loaded)
        for index, state in self._states.items():
            found |= {f"{index}.{name}": value for name, value in state.state_dict().items()}
        return found

    def load_state_dict(self, state: Mapping[str, Array | str]) -> None:
        """Go on from a saved state, with the same model and options; it is taken over bucket by bucket.

        Raises:
            UsageError: from the next backward pass, if a bucket does not fit.
        """
        self._states.clear()
        self._loaded = dict(state)

    def checkpoint_state_of_new_rank(self, state: Mapping[str, Array | str]) -> dict[str, Array | str]:
        """Make, of another rank's state, that of a rank that was not there when it was saved: its errors are zero."""
        return {name: value for name, value in state.items() if name.split(".")[1] != "error"}

    def __call__(self, bucket: GradBucket, group: ProcessGroup) -> Pending:
        """Start to average a bucket (steps 1 and 2)."""
        state = self._state(bucket)
        state.steps += 1
        if state.steps <= self.start_after or not state.matrices:
            return mean(bucket, group)
        if state.steps > 1 and not self.warm_start:
            state.draw_qs()
        return _CompressedAverage(state, bucket, group)

    def _state(self, bucket: GradBucket) -> _BucketState:
        state = self._states.get(bucket.index)
        if state is None:
            rng = np.random.default_rng((self.seed, bucket.index))
            state = _BucketState(bucket, self.rank, rng, error_feedback=self.error_feedback)
            self._states[bucket.index] = state
            prefix = f"{bucket.index}."
            names = [name for name in self._loaded if name.startswith(prefix)]
            if names:
                state.load({name.removeprefix(prefix): self._loaded.pop(name) for name in names})
        elif state.names != bucket.names:
            raise UsageError(
                f"PowerSGD: bucket {bucket.index} holds other parameters than before "
                f"({bucket.names[0]!r}, …): make one PowerSGD for each DDP module."
            )
        return state


@dataclass(frozen=True, slots=True, kw_only=True)
class _LowRankGradient:
    """One compressed gradient: its index in the bucket, P, Q and the error."""

    index: int
    p: Array
    q: Array
    error: Array | None


class _BucketState:
    """The state of a bucket that lasts from step to step.

    Attributes:
        names: names of the parameters in the bucket.
        steps: number of steps so far.
        ps, qs: all P and all Q, each in one array, as they are sent.
        matrices: the gradients that are compressed.
        vectors: indices of the other gradients.
    """

    def __init__(self, bucket: GradBucket, rank: int, rng: np.random.Generator, *, error_feedback: bool) -> None:
        xp = namespace_of(bucket.buffer)
        self.names = bucket.names
        self.steps = 0
        shapes = {
            index: (grad.shape[0], grad.size // grad.shape[0])
            for index, grad in enumerate(bucket.grads)
            if _worth_compressing(grad, rank)
        }
        ranks = {index: min(rank, *shape) for index, shape in shapes.items()}
        dtype = wide_dtype(bucket.buffer.dtype)
        self.ps = xp.empty(sum(n * ranks[i] for i, (n, _) in shapes.items()), dtype)
        self.qs = xp.empty(sum(m * ranks[i] for i, (_, m) in shapes.items()), dtype)
        ps = _views(self.ps, [(n, ranks[i]) for i, (n, _) in shapes.items()])
        qs = _views(self.qs, [(m, ranks[i]) for i, (_, m) in shapes.items()])
        self.matrices = [
            _LowRankGradient(index=index, p=p, q=q, error=xp.zeros(shapes[index], dtype) if error_feedback else None)
            for index, p, q in zip(shapes, ps, qs, strict=True)
        ]
        self.vectors = [index for index in range(len(bucket.grads)) if index not in shapes]
        self._rng = rng
        self.draw_qs()

    def draw_qs(self) -> None:
        """Draw every Q from the random generator, which is the same on every rank."""
        drawn = self._rng.standard_normal(self.qs.size).astype(self.qs.dtype)
        self.qs[...] = namespace_of(self.qs).asarray(drawn)

    def state_dict(self) -> dict[str, Array | str]:
        """Copy what lasts from step to step into arrays by name, and the generator's state as JSON."""
        errors = {f"error.{matrix.index}": matrix.error.copy() for matrix in self.matrices if matrix.error is not None}
        generator = json.dumps(self._rng.bit_generator.state)
        return {"steps": np.array(self.steps), "qs": self.qs.copy(), "generator": generator, **errors}

    def load(self, state: Mapping[str, Array | str]) -> None:
        """Take over what `state_dict` made; a file of arrays may have made an array of the text, too."""
        own = self.state_dict()
        if not any(name.startswith("error.") for name in state):  # of another rank
            own = {name: value for name, value in own.items() if not name.startswith("error.")}
        if {name: np.shape(value) for name, value in own.items()} != {n: np.shape(value) for n, value in state.items()}:
            raise UsageError(
                f"PowerSGD: the loaded state does not fit the bucket of {self.names[0]!r}, …: "
                "load it with the same model, bucket sizes and options."
            )
        xp = namespace_of(self.qs)
        self.steps = int(state["steps"])
        self.qs[...] = xp.asarray(state["qs"])
        self._rng.bit_generator.state = json.loads(str(state["generator"]))
        for matrix in self.matrices:
            if matrix.error is not None:
                matrix.error[...] = xp.asarray(state.get(f"error.{matrix.index}", 0))


class _CompressedAverage:
    """The average of one bucket, which is under way (steps 1 and 2) until `wait` ends it."""

    def __init__(self, state: _BucketState, bucket: GradBucket, group: ProcessGroup) -> None:
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
        """Run steps 3 to 5."""
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
            for grad, piece in zip(grads, _views(flat, [g.shape for g in grads]), strict=True):
                grad[...] = piece

    def _grad(self, matrix: _LowRankGradient) -> Array:
        grad = self._bucket.grads[matrix.index]
        return grad.reshape(grad.shape[0], -1)


def _worth_compressing(grad: Array, rank: int) -> bool:
    """Return True if a gradient is a real matrix whose size compression at least halves."""
    if grad.ndim < 2 or grad.size == 0 or grad.dtype.kind == "c":
        return False
    n, m = grad.shape[0], grad.size // grad.shape[0]
    return bool(2 * min(rank, n, m) * (n + m) <= n * m)


def _views(flat: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return [
        flat[end - int(np.prod(shape)) : end].reshape(shape) for end, shape in zip(ends.tolist(), shapes, strict=True)
    ]
