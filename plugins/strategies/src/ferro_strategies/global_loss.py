"""GlobalLoss: the mean loss over the items of all ranks and microbatches, where their numbers differ.

DDP and FSDP average the ranks' gradients, and passes under `no_sync` add them up. That is the gradient of the whole
batch where each part's loss is a mean over equally many items. Where numbers differ, as those of tokens that are not
padding, each part's gradient has to be multiplied by

    its own number of items * number of ranks / number of items of all parts on all ranks
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import numpy as np

from ferro import ProcessGroup, UsageError

from .nn.arrays import Array, wide_dtype
from .nn.module import Module
from .nn.trees import Arrays, map_leaves


@runtime_checkable
class AveragesGradients(Protocol):
    """A module that averages gradients over ranks, as DDP and FSDP do."""

    @property
    def averaging_groups(self) -> tuple[ProcessGroup, ...]:
        """The groups over which gradients are averaged, one after the other."""


class GlobalLoss:
    """The loss of one step: the mean over all items of all ranks, and the gradients for it.

        kept = sum((labels != -100).sum() for _, labels in microbatches)
        step = GlobalLoss(model, kept)                          # one small reduction
        for x, labels in microbatches:
            logits, pullback = model.vjp(x)                     # all but the last one in model.no_sync()
            pullback(step.gradient(*cross_entropy(logits, labels, ignore_index=-100, with_weight=True)))
        optimizer.step()
        print(step.mean())                                      # another one

    A rank may have no items, but takes part all the same. A Pipeline needs no GlobalLoss: its loss function returns
    the weight. In `DDP.join` and `FSDP.join`, where ranks come to an end, use `divide_by_initial_world_size=True`, and
    make no GlobalLoss.

    Args:
        over: the DDP or FSDP module, or a module that contains one; or the group of the ranks whose gradients are
            averaged. With another module the mean is over this rank's microbatches.
        weight: the number of items (or the sum of their weights) in all of this rank's microbatches of the step. All
            ranks call it.

    Attributes:
        total: the sum of all ranks' weights.

    Raises:
        UsageError: `weight` is negative or not finite on some rank; raised on every rank.
    """

    def __init__(self, over: Module | ProcessGroup, weight: float) -> None:
        self._groups = _averaging_groups(over)
        self._weight = float(weight)
        fits = 0 <= self._weight < math.inf
        row = np.array([self._weight if fits else 0.0, 1.0, not fits])
        for group in self._groups:
            row = group.all_reduce(row)
        self.total, self._ranks = float(row[0]), float(row[1])
        if row[2]:
            raise UsageError(f"GlobalLoss: a weight must be a number from 0 on, on every rank; here it is {weight}.")
        self._loss = self._seen = 0.0

    def gradient(self, loss: float, grad: Arrays, weight: float) -> Arrays:
        """Take the result of a loss function for one microbatch; return the gradient for the pullback.

        Args:
            loss: the mean loss over the microbatch's items; ignored if there is none.
            grad: its gradient.
            weight: the number of items.
        """
        if not weight:
            return map_leaves(np.zeros_like, grad)
        self._seen += float(weight)
        self._loss += float(weight) * float(loss)
        return scaled(grad, float(weight) * self._ranks / self.total) if self.total else grad

    def mean(self) -> float:
        """Compute the mean loss over all items of all ranks; all ranks call it after their last microbatch.

        Raises:
            UsageError: on some rank, the microbatches' weights do not add up to the weight that was announced, so that
                gradients are wrong. It is raised on every rank.
        """
        row = np.array([self._loss, not math.isclose(self._seen, self._weight, rel_tol=1e-6)])
        for group in self._groups:
            row = group.all_reduce(row)
        if row[1]:
            raise UsageError(
                f"GlobalLoss: the weights of a rank's microbatches do not add up to the weight that it announced; on "
                f"this rank they are {self._seen:g} of {self._weight:g}. The step's gradients are wrong."
            )
        return float(row[0]) / self.total if self.total else 0.0


def global_mean(over: Module | ProcessGroup, loss: float, grad: Arrays, weight: float) -> tuple[float, Arrays]:
    """Turn the loss of this rank's batch into the mean over all ranks' items, for a step of one batch on each rank.

        logits, pullback = model.vjp(x)
        loss, grad = global_mean(model, *cross_entropy(logits, labels, ignore_index=-100, with_weight=True))
        pullback(grad)

    All ranks call it, also one that has no items; it takes one small reduction. See `GlobalLoss` for several
    microbatches.

    Args:
        over: the DDP or FSDP module, or the group of the ranks whose gradients are averaged.
        loss: the mean loss over this rank's items; ignored if there is none.
        grad: its gradient.
        weight: the number of this rank's items.

    Returns:
        The mean over all items, and the gradient for this rank's pullback.

    Raises:
        UsageError: `weight` is negative or not finite on some rank; raised on every rank.
    """
    fits = 0 <= float(weight) < math.inf
    own = float(weight) if fits else 0.0
    row = np.array([own * float(loss) if own else 0.0, own, 1.0, not fits])
    for group in _averaging_groups(over):
        row = group.all_reduce(row)
    total_loss, total, ranks, faults = map(float, row)
    if faults:
        raise UsageError(f"global_mean: a weight must be a number from 0 on, on every rank; here it is {weight}.")
    if not own:
        return (total_loss / total if total else 0.0), map_leaves(np.zeros_like, grad)
    return total_loss / total, scaled(grad, own * ranks / total)


def scaled(grads: Arrays, factor: float) -> Arrays:
    """Multiply gradients by a factor, each in its own dtype; half precision is rounded once."""
    if factor == 1.0:
        return grads

    def scale(grad: Array) -> Array:
        product: Array = grad.astype(wide_dtype(grad.dtype), copy=False) * factor
        return product.astype(grad.dtype, copy=False)

    return map_leaves(scale, grads)


def _averaging_groups(over: Module | ProcessGroup) -> tuple[ProcessGroup, ...]:
    if isinstance(over, ProcessGroup):
        return (over,)
    if not isinstance(over, Module):
        raise UsageError(
            f"expected a module or a process group, whose ranks' gradients are averaged, got a {type(over).__name__}."
        )
    return next((module.averaging_groups for module in over.modules() if isinstance(module, AveragesGradients)), ())
