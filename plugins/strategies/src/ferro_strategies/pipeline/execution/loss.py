"""The loss of a step: the loss function's results for each microbatch, and their mean over the batch.

A loss function returns a mean and its gradient. Microbatches then count by their numbers of targets. Where the mean is
over fewer items than that, such as the tokens that are not padding, the function also returns this number, its weight.
The sum of all weights is known only after the last microbatch, when the first gradients have long been sent back. So
all gradients of a step are divided by a number known in advance, the reference, and when the pass is over, the
parameters' gradients are multiplied by reference / sum of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np

from ferro import UsageError

from ...global_loss import scaled
from ...nn.arrays import Array, namespace_of
from ...nn.checks import check_gradient
from ...nn.trees import Arrays, map_leaves, shapes_of
from .microbatches import sizes_of

# Takes the last stage's output and the targets of a microbatch, and returns (loss, grad): a mean over the targets'
# elements, and its gradient with respect to the output. It may also return (loss, grad, weight): means over so many
# items. Metrics, a dict of numbers that are averaged like the loss, may follow.
Loss: TypeAlias = Callable[[Any, Any], tuple[Any, ...]]

_FORM = "the loss function must return (loss, grad), as nn.cross_entropy does"
_MORE = "A weight may follow, the number of items that the mean is over, and a dict of metrics"


@dataclass(slots=True)
class LossTotals:
    """Sums over a step's microbatches; on ranks without the last stage they are zero.

    Attributes:
        NUMBERS: the number of numbers in `as_array`.
        loss: the sum of losses, each times its weight.
        weight: the sum of weights.
        reference: the number by which each microbatch's weight was divided in its gradient; 0.0 where the function
            returned no weights, and the gradients are those of the mean already.
        metrics: the sum of each metric, times weights.
    """

    NUMBERS: ClassVar[int] = 4

    loss: float = 0.0
    weight: float = 0.0
    reference: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_array(cls, row: Array) -> tuple[LossTotals, bool]:
        """Return the totals without their metrics, and whether there are metrics."""
        loss, weight, reference, has_metrics = map(float, row)
        return cls(loss=loss, weight=weight, reference=reference), bool(has_metrics)

    @property
    def mean(self) -> float:
        """The mean loss; 0.0 without items."""
        return self.loss / self.weight if self.weight else 0.0

    @property
    def mean_metrics(self) -> dict[str, float]:
        """The mean of each metric."""
        return {name: total / self.weight for name, total in self.metrics.items()}

    def as_array(self) -> Array:
        """Return the numbers that all ranks learn at the end of a pass: loss, weight, reference, has metrics."""
        return np.array([self.loss, self.weight, self.reference, bool(self.metrics)], np.float64)


class LossOfMicrobatches:
    """Calls the loss function for each microbatch, and sums up.

    Args:
        function: see `Loss`.
        targets: the targets of every microbatch.
        returned_weight: whether the function returned weights in the last step, which says what to expect of it where
            no microbatch has targets.

    Attributes:
        totals: the sums so far.
    """

    def __init__(self, function: Loss, targets: Sequence[Arrays], *, returned_weight: bool) -> None:
        self.totals = LossTotals(reference=float(returned_weight))
        self._function = function
        self._targets = targets
        self._sizes = sizes_of(targets)
        self._size = sum(self._sizes)
        self._returns_weight: bool | None = None
        self._has_uneven_gaps = _has_uneven_gaps(targets)

    def __call__(self, y: Arrays, microbatch: int) -> Arrays:
        """Compute the gradient of the step's loss with respect to an output of the last stage.

        Raises:
            UsageError: the loss function returned something else than a `Loss`.
        """
        size, targets = self._sizes[microbatch], self._targets[microbatch]
        if size == 0:  # the mean over no targets may be nan
            return _zeros(y)
        loss, grad, weight, metrics = _parse(self._function(y, targets))
        check_gradient("the loss function", grad, shapes_of(y))
        if weight is not None and not 0 <= weight < math.inf:
            raise UsageError(f"the loss function returned the weight {weight}; a weight is a number from 0 on.")
        if self._returns_weight is None:
            self._returns_weight = weight is not None
            # No gradient on the way is larger than it will be, unless a microbatch has more items per target than the
            # first one: in float16 it could overflow.
            self.totals.reference = 0.0 if weight is None else self._size * max(1.0, weight / size)
        if self._returns_weight != (weight is not None):
            raise UsageError(
                "the loss function returned a weight, (loss, grad, weight), for one microbatch and none for another. "
                "Return the same for all."
            )
        if weight is None:
            self._check_no_gaps(targets, grad)
            weight, divisor = size, self._size
        else:
            divisor = self.totals.reference
        self.totals.weight += weight
        if weight == 0:
            return _zeros(y)
        self.totals.loss += weight * loss
        for name, value in metrics.items():
            self.totals.metrics[name] = self.totals.metrics.get(name, 0.0) + weight * float(value)
        return scaled(grad, weight / divisor)

    def _check_no_gaps(self, targets: Arrays, grad: Arrays) -> None:
        """Refuse a mean over fewer targets than there are, if it shows.

        It shows where negative labels, such as ignore_index=-100, have no gradient.
        """
        if not self._has_uneven_gaps:
            return
        gaps = targets < 0
        if not gaps.any() or getattr(grad, "shape", ())[: gaps.ndim] != gaps.shape or grad[gaps].any():
            return
        raise UsageError(
            "the loss function returned (loss, grad), and no gradient at negative labels, whose number differs between "
            "microbatches. If the loss is a mean over the other labels, microbatches would get wrong weights. Return "
            "(loss, grad, weight), where weight is the number of labels that count: "
            "nn.cross_entropy(y, labels, ignore_index=-100, with_weight=True). If it is a mean over all labels, return "
            "labels.size as weight."
        )


def _parse(result: object) -> tuple[float, Arrays, float | None, Mapping[str, float]]:
    """Take the loss function's result apart: loss, gradient, weight or None, metrics."""
    if not isinstance(result, tuple | list) or not 2 <= len(result) <= 4:
        of = f" of {len(result)}" if isinstance(result, tuple | list) else ""
        raise UsageError(f"{_FORM}; it returned a {type(result).__name__}{of}. {_MORE}.")
    loss, grad, *rest = result
    metrics = rest.pop() if rest and isinstance(rest[-1], Mapping) else {}
    weight = rest.pop() if rest else None
    try:
        return float(loss), grad, None if weight is None else float(weight), metrics
    except (TypeError, ValueError):
        found = ", ".join(type(item).__name__ for item in result)
        raise UsageError(f"{_FORM}; it returned ({found}). {_MORE}.") from None


def _zeros(y: Arrays) -> Arrays:
    """Return a gradient of zeros; None where a leaf is no array of floating-point numbers."""
    return map_leaves(lambda leaf: namespace_of(leaf).zeros_like(leaf) if is_differentiable(leaf) else None, y)


def is_differentiable(leaf: object) -> bool:
    """Return True for an array that may have a gradient: of floating-point or complex numbers."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and dtype.kind not in "iub"


def _has_uneven_gaps(targets: Sequence[Arrays]) -> bool:
    """Say whether microbatches have different shares of negative labels."""
    shares = set()
    for part in targets:
        dtype = getattr(part, "dtype", None)
        if dtype is None or dtype.kind != "i":
            return False
        if part.size:
            shares.add(int((part < 0).sum()) / part.size)
    return len(shares) > 1
