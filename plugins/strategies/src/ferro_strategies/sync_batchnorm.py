"""SyncBatchNorm: BatchNorm with the statistics of the batches of all ranks together."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup

from .nn.arrays import Array, namespace_of
from .nn.batchnorm import BatchNorm, Moments, merge_moments
from .nn.checks import check_group, check_input
from .nn.module import Module, replace_modules


class SyncBatchNorm(BatchNorm):
    """BatchNorm over the batches of all ranks, whose sizes may differ, for (N, C) or (N, C, ...).

    Output, running statistics and the input's gradient are those of `nn.BatchNorm` on the whole batch in one process. A
    rank may have an empty batch, but must run the same passes as the other ranks. In training a forward pass takes one
    message (an all_gather of count, mean and squared deviations, in float64) and a pullback another (an all_reduce of
    two sums); in evaluation there are none.

    Gradients of weight and bias are sums over this rank's batch alone, as in every other layer. Their average by DDP is
    the gradient of the whole batch if each rank's loss is a mean over its own batch, and all batches have one size. For
    other sizes, weight each rank's loss by its share of rows times the number of ranks.

    Under DDP the running statistics are the same on all ranks, so `broadcast_buffers=False` saves messages. Ranks
    without batches in `DDP.join` take no part in the messages of this layer: give them empty batches instead. With
    `find_unused`, give the layer a group of its own (`group.split(0)`), because ranks then send their gradients at
    different times.

    Args:
        num_features: channels, C.
        group: the ranks whose batches are normalised together.
        eps: added to the variance.
        momentum: weight of a new batch; None: running statistics are the average of all batches.
        affine: whether there are weight and bias.
        dtype: of parameters, input and output; statistics are float32 in half precision.

    Attributes:
        weight: (C,), ones at first; None without affine.
        bias: (C,), zeros at first; None without affine.
        running_mean: buffer, (C,), zeros at first.
        running_var: buffer, (C,), ones at first; moves by the unbiased variance of all ranks.
        num_batches_tracked: buffer, 0-d int64.
    """

    # The shapes of input that messages name, and their numbers of dimensions; () allows any.
    _input_shapes: ClassVar[str] = "(N, {c}) or (N, {c}, ...)"
    _ndims: ClassVar[tuple[int, ...]] = ()

    def __init__(
        self,
        num_features: int,
        group: ProcessGroup,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, dtype=dtype)
        check_group(type(self).__name__, group)
        self._group = group

    def _merge(self, own: Moments) -> Moments:
        xp, c = namespace_of(own.mean), self.num_features
        row = xp.empty((1, 1 + 2 * c), np.float64)
        row[0, 0] = own.count
        row[0, 1 : 1 + c] = own.mean
        row[0, 1 + c :] = own.m2
        rows = self._group.all_gather(row)
        return merge_moments(rows[:, 0], rows[:, 1 : 1 + c], rows[:, 1 + c :])

    def _sum_over_batch(self, sums: Array) -> Array:
        total: Array = self._group.all_reduce(sums.astype(np.float64))
        return total

    def _check(self, x: Array) -> None:
        self._check_dtype(x)
        fits = x.ndim in self._ndims if self._ndims else x.ndim >= 2
        fits = fits and x.shape[1] == self.num_features
        check_input(self, x, self._input_shapes.format(c=self.num_features), fits=fits)


class SyncBatchNorm1d(SyncBatchNorm):
    """`SyncBatchNorm` of (N, C) or (N, C, L)."""

    _input_shapes = "(N, {c}) or (N, {c}, L)"
    _ndims = (2, 3)


class SyncBatchNorm2d(SyncBatchNorm):
    """`SyncBatchNorm` of (N, C, H, W)."""

    _input_shapes = "(N, {c}, H, W)"
    _ndims = (4,)


class SyncBatchNorm3d(SyncBatchNorm):
    """`SyncBatchNorm` of (N, C, D, H, W)."""

    _input_shapes = "(N, {c}, D, H, W)"
    _ndims = (5,)


def convert_sync_batchnorm(module: Module, group: ProcessGroup) -> Module:
    """Put a SyncBatchNorm in the place of every `nn.BatchNorm`; return the root.

    Parameters and buffers are the same objects afterwards, with the same names, so optimizers
    and saved states fit as before. `module` is changed in place; a `module` that is a BatchNorm
    itself stays as it is, and the SyncBatchNorm that replaces it is returned.

    Args:
        module: the model, before or after it is wrapped in a strategy; classes derived from
            BatchNorm are left as they are.
        group: the ranks whose batches are normalised together.
    """

    def convert(_name: str, found: Module) -> Module:
        return _converted(found, group) if type(found) is BatchNorm else found

    return replace_modules(module, convert)


def _converted(norm: BatchNorm, group: ProcessGroup) -> SyncBatchNorm:
    new = SyncBatchNorm(norm.num_features, group, eps=norm.eps, momentum=norm.momentum, affine=norm.weight is not None)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    new.training = norm.training
    return new
