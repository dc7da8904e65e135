"""BatchNorm: normalise each channel by its mean and variance over the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

from .arguments import check_real, check_real_dtype, whole_number
from .arrays import Array, namespace_of, quiet_overflow, wide_dtype
from .checks import check_dtype, check_gradient, check_input
from .module import Buffer, Module, Pullback
from .parameter import Parameter
from .sums import channel_dots, channel_sums


class BatchNorm(Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, per channel of (N, C) or (N, C, ...).

    In training, mean and (biased) variance are those of the batch, over all dimensions but the
    channels, and update the running statistics: running = (1 - momentum) * running + momentum *
    batch, with the unbiased variance. An empty batch leaves them alone. Evaluation uses the running
    statistics. Half precision is computed in float32, and so are the running statistics: float16 has
    no variance above 65504. A layer of float32 takes input in half precision, too, and its output
    has the input's dtype.

    Args:
        num_features: number of channels, C.
        eps: added to the variance.
        momentum: weight of a new batch; None: running statistics are the average of all batches.
        affine: whether there are weight and bias.
        track_running_stats: whether there are running statistics; without them, evaluation normalises by the batch.
        dtype: dtype of parameters, input and output.

    Attributes:
        weight: (C,), ones at first; None without affine.
        bias: (C,), zeros at first; None without affine.
        running_mean: buffer, (C,), zeros at first, float32 for half precision; None without statistics.
        running_var: buffer, (C,), ones at first, float32 for half precision; None without statistics.
        num_batches_tracked: buffer, 0-d int64; None without statistics.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, algorithms 1 and 2.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        check_real_dtype(type(self).__name__, dtype)
        self.num_features = c = whole_number(type(self).__name__, "num_features", num_features)
        self.eps = eps
        self.momentum = momentum
        self.weight = Parameter(np.ones(c, dtype), name="weight") if affine else None
        self.bias = Parameter(np.zeros(c, dtype), name="bias") if affine else None
        wide = wide_dtype(dtype)
        self.running_mean = Buffer(np.zeros(c, wide)) if track_running_stats else None
        self.running_var = Buffer(np.ones(c, wide)) if track_running_stats else None
        self.num_batches_tracked = Buffer(np.zeros((), np.int64)) if track_running_stats else None
        self._deferred = DeferredMoments()

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Normalise (N, C) or (N, C, ...); in training, update the running statistics as well.

        Raises:
            UsageError: shape or dtype is wrong, or a training batch has one value per channel.
        """
        self._check(x)
        whole_shape, dtype = x.shape, x.dtype
        # The code below works on (N, C, L); L is 1 for (N, C), and the number of pixels for images.
        shape = (*x.shape[:2], x[0, 0].size if x.size else 0)
        wide = wide_dtype(dtype)
        # NumPy sums pairwise along contiguous memory only.
        values = namespace_of(x).ascontiguousarray(x.reshape(shape), wide)
        tracked = self.running_mean is not None and self.running_var is not None
        normal = self._by_running(values) if tracked and not self.training else self._by_batch(values)
        weight = self.weight.use() if self.weight is not None else None
        bias = self.bias.use() if self.bias is not None else None
        y = normal.xhat
        if weight is not None and bias is not None:
            y = y * weight.data[:, None]
            y += bias.data[:, None]

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, whole_shape, real=True)
            grad = namespace_of(x).ascontiguousarray(grad_y.reshape(shape), wide)
            # The sums of grad and grad * xhat are the gradients of bias and weight; the input's gradient needs them
            # too, because the batch's mean and variance depend on every value.
            sums = namespace_of(grad).stack((channel_sums(grad), channel_dots(grad, normal.xhat)))
            whole = self._sum_over_batch(sums) if normal.count else sums
            scale = normal.inverse
            if weight is not None and bias is not None:
                scale = scale * weight.data
                bias.add_grad(sums[0])
                weight.add_grad(sums[1])
            grad_x = _input_gradient(normal, grad, whole, scale)
            with quiet_overflow(dtype):
                return grad_x.reshape(whole_shape).astype(dtype, copy=False)

        with quiet_overflow(dtype):
            return y.reshape(whole_shape).astype(dtype, copy=False), pullback

    def _merge(self, own: Moments) -> Moments:
        """Compute the moments of the whole batch from those of this rank's part of it."""
        return own

    def _sum_over_batch(self, sums: Array) -> Array:
        """Compute sums over the whole batch from those of this rank's part of it, (2, C)."""
        return sums

    def _by_batch(self, values: Array) -> _Normalised:
        """Normalise (N, C, L) by the batch's statistics, and update the running ones."""
        count = values.shape[0] * values.shape[2]
        mean = channel_sums(values) / max(count, 1)
        xhat = values - mean[:, None]
        own = Moments(count=count, mean=mean, m2=channel_dots(xhat, xhat))
        batch = self._merge(own)
        if batch.count == 0:
            return _Normalised(xhat=xhat, inverse=namespace_of(values).ones_like(mean), count=0)
        if batch.count < 2:
            raise UsageError(
                f"{self!r}: training needs more than one value per channel, got input of shape "
                f"{values.shape[:2]} with {batch.count}. Use a larger batch, or call eval()."
            )
        if batch is not own:
            xhat -= (batch.mean - mean).astype(values.dtype)[:, None]
        var = batch.m2 / batch.count
        inverse = 1 / namespace_of(values).sqrt(var + self.eps)
        inverse = inverse.astype(values.dtype, copy=False)
        xhat *= inverse[:, None]
        if self.training and not self._deferred.take(batch):
            self._update_running(batch.mean, var * (batch.count / (batch.count - 1)))
        return _Normalised(xhat=xhat, inverse=inverse, count=batch.count)

    def _by_running(self, values: Array) -> _Normalised:
        """Normalise (N, C, L) by the running statistics, which do not depend on the input."""
        assert self.running_mean is not None, "the caller has checked it"
        assert self.running_var is not None, "the caller has checked it"
        var = self.running_var.data.astype(values.dtype, copy=False)
        inverse = 1 / namespace_of(values).sqrt(var + self.eps)
        xhat = values - self.running_mean.data[:, None]
        xhat *= inverse[:, None]
        return _Normalised(xhat=xhat, inverse=inverse, count=0)

    def _update_by_deferred(self) -> None:
        """Update the running statistics by the moments of all batches since `deferring_statistics`, as of one batch."""
        if batch := self._deferred.merged():
            self._update_running(batch.mean, batch.m2 / batch.count * (batch.count / (batch.count - 1)))

    def _update_running(self, mean: Array, unbiased_var: Array) -> None:
        if self.num_batches_tracked is None or self.running_mean is None or self.running_var is None:
            return
        tracked = self.num_batches_tracked.data
        tracked += 1
        factor = 1 / int(tracked) if self.momentum is None else self.momentum
        running = ((self.running_mean.data, mean), (self.running_var.data, unbiased_var))
        for kept, new in running:
            kept *= 1 - factor
            kept += (factor * new).astype(kept.dtype, copy=False)

    def _check(self, x: Array) -> None:
        c = self.num_features
        self._check_dtype(x)
        check_input(self, x, f"(N, {c}) or (N, {c}, ...)", fits=x.ndim >= 2 and x.shape[1] == c)

    def _check_dtype(self, x: Array) -> None:
        """Refuse an input whose dtype is neither that of the parameters nor one that is computed in that dtype.

        Raises:
            UsageError: the dtype is another, or not of real floating-point numbers.
        """
        check_real(self, x)
        holder = self.weight if self.weight is not None else self.running_mean
        if holder is not None and wide_dtype(x.dtype) != holder.data.dtype:
            check_dtype(self, x, holder.data.dtype)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.weight is not None}"
            f"{'' if self.running_mean is not None else ', track_running_stats=False'})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Count, mean and squared deviations of the values of each of C channels.

    Attributes:
        count: number of values per channel.
        mean: (C,); zeros when there are no values.
        m2: (C,), sums of squared deviations from `mean`; never negative.
    """

    count: int
    mean: Array
    m2: Array


def merge_moments(counts: Array, means: Array, m2s: Array) -> Moments:
    """Compute the moments of all values from the moments of n parts, some of which may be empty.

    No sums of squares are subtracted, so no digits cancel, however far the values are from zero.

    Args:
        counts: (n,), of the dtype of `means` and `m2s`.
        means: (n, C).
        m2s: (n, C).

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979, equations 2.1, extended from two parts to n.
    """
    total = counts.sum()
    count = int(total)
    shares = (counts / max(count, 1))[:, None]
    mean = (shares * means).sum(axis=0)
    deviations = means - mean
    m2 = m2s.sum(axis=0) + (counts[:, None] * deviations * deviations).sum(axis=0)
    return Moments(count=count, mean=mean, m2=m2)


class DeferredMoments:
    """The moments of the batches of one layer, while the update of its running statistics is deferred."""

    def __init__(self) -> None:
        self._batches: list[Moments] | None = None

    def take(self, batch: Moments) -> bool:
        """Keep a batch's moments if the update is deferred; return whether it is."""
        if self._batches is None:
            return False
        self._batches.append(batch)
        return True

    def merged(self) -> Moments | None:
        """Compute the moments of all batches together; None if there was none."""
        batches = self._batches or []
        if len(batches) < 2:
            return batches[0] if batches else None
        xp = namespace_of(batches[0].mean)
        counts = xp.asarray([batch.count for batch in batches], np.float64)
        means, m2s = (
            xp.stack(parts).astype(np.float64) for parts in zip(*((b.mean, b.m2) for b in batches), strict=True)
        )
        return merge_moments(counts, means, m2s)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep the moments of the batches in the block; forget them at its end."""
        before, self._batches = self._batches, []
        try:
            yield
        finally:
            self._batches = before


@contextmanager
def deferring_statistics(norms: Iterable[BatchNorm]) -> Iterator[None]:
    """Update running statistics once, at the end of the block, as if its batches had been one batch.

    A step of several microbatches then changes them as much as a step of one; each microbatch is still normalised by
    its own statistics. After an error they stay as they are.

    Source: Kim et al., "torchgpipe", 2020, DeferredBatchNorm.
    """
    layers = list(norms)
    with ExitStack() as stack:
        for norm in layers:
            stack.enter_context(norm._deferred.collecting())
        yield
        for norm in layers:
            norm._update_by_deferred()


@contextmanager
def ignoring_statistics(norms: Iterable[BatchNorm]) -> Iterator[None]:
    """Keep running statistics, and those that are deferred, as they are: a pass in the block repeats another one."""
    with ExitStack() as stack:
        for norm in norms:
            stack.enter_context(norm._deferred.collecting())
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class _Normalised:
    """Normalised values, and what their gradient depends on.

    Attributes:
        xhat: the values, (N, C, L).
        inverse: 1 / standard deviation, (C,).
        count: number of values per channel from which the statistics were computed; 0 when the
            statistics do not depend on the input.
    """

    xhat: Array
    inverse: Array
    count: int


def _input_gradient(normal: _Normalised, grad: Array, sums: Array, scale: Array) -> Array:
    """Compute the gradient of the input, (N, C, L), from that of the output.

    It is scale * (grad - mean(grad) - xhat * mean(grad * xhat)), or scale * grad when the
    statistics do not depend on the input.
    """
    if not normal.count:
        scaled: Array = grad * scale[:, None]
        return scaled
    by_mean, by_var = (sums / normal.count).astype(grad.dtype, copy=False)
    grad_x: Array = normal.xhat * -by_var[:, None]
    grad_x += grad
    grad_x -= by_mean[:, None]
    grad_x *= scale[:, None]
    return grad_x
