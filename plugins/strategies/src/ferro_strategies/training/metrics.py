"""AveragedMetrics: means over the samples of all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from ferro import ProcessGroup, UsageError

from ..nn.checks import check_group


class AveragedMetrics:
    """Means of several metrics, each value weighted by the samples that it is the mean of.

    A mean of the ranks' means would be wrong where batches have different sizes. Sums are kept and added in float64
    without rounding, so that the result depends on no order: neither of the batches nor of the ranks.

        metrics = AveragedMetrics(group)
        for x, labels in loader:
            …
            metrics.add(len(x), loss=loss, accuracy=accuracy)
        print(metrics.compute()["loss"])     # the same on every rank
    """

    def __init__(self, group: ProcessGroup) -> None:
        check_group("AveragedMetrics", group)
        self._group = group
        self._sums: dict[str, list[float]] = {}
        self._counts: dict[str, float] = {}

    def add(self, count: float, /, **means: float) -> None:
        """Add a batch's means over `count` samples."""
        if not (count >= 0 and math.isfinite(count)):
            raise UsageError(f"AveragedMetrics: the count of samples must be at least 0, not {count}.")
        for name, mean in means.items():
            if count:
                _add_exactly(self._sums.setdefault(name, []), float(mean) * float(count))
                self._counts[name] = self._counts.get(name, 0.0) + float(count)

    def compute(self, *, reset: bool = True) -> dict[str, float]:
        """Return the mean of each metric over the samples of all ranks since the last reset, by name.

        All ranks call it; it exchanges one message for all metrics. A rank without samples, or without some of the
        metrics, takes part as well.
        """
        own = {name: (self._sums[name], self._counts[name]) for name in self._sums}
        everyones: list[Mapping[str, tuple[list[float], float]]] = self._group.all_gather_object(own)
        if reset:
            self._sums, self._counts = {}, {}
        names = dict.fromkeys(name for metrics in everyones for name in metrics)
        return {name: _mean([metrics[name] for metrics in everyones if name in metrics]) for name in names}


def _mean(parts: list[tuple[list[float], float]]) -> float:
    terms = [term for terms, _ in parts for term in terms]
    if not all(map(math.isfinite, terms)):
        return sum(terms)
    exact = sum(map(Fraction, terms)) / sum(Fraction(count) for _, count in parts)
    return float(exact)  # rounded once


def _add_exactly(terms: list[float], value: float) -> None:
    """Add a number to a sum, which is kept as terms that do not overlap. Source: Shewchuk 1997, Grow-Expansion."""
    if not all(map(math.isfinite, (*terms, value))):
        terms[:] = [sum(terms, value)]
        return
    rest, total = [], value
    for term in terms:
        larger, smaller = (total, term) if abs(total) >= abs(term) else (term, total)
        total = larger + smaller
        if lost := smaller - (total - larger):
            rest.append(lost)
    terms[:] = [*rest, total] if math.isfinite(total) else [*terms, value]
