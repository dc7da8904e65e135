"""Which checkpoints to keep: the last ones, or the best ones by a metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ferro import UsageError


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint in the directory: its name, its step, the metrics that it was saved with, and when that was."""

    name: str
    step: int
    metrics: Mapping[str, float]
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class Last:
    """Keep the `n` checkpoints that were saved last."""

    n: int

    def __post_init__(self) -> None:
        _check_count("Last", self.n)

    def __or__(self, other: KeepPolicy) -> UnionOf:
        return UnionOf((self, other))

    def kept(self, saved: Sequence[Saved]) -> set[str]:
        """Choose the names to keep of checkpoints in the order in which they were saved."""
        return {one.name for one in saved[-self.n :]}


@dataclass(frozen=True, slots=True)
class Best:
    """Keep the `n` checkpoints whose metric, as it was given to `step()` on rank 0, is the least or the greatest.

    Of equal ones the later is better. Checkpoints without the metric, or with infinity or NaN, are not among the best.
    """

    metric: str
    n: int
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        _check_count("Best", self.n)
        if type(self.metric) is not str:
            raise UsageError(f"Best: metric is the name that step() is given it by, not {self.metric!r}")
        if self.mode not in ("min", "max"):
            raise UsageError(f"Best: mode is 'min' or 'max', not {self.mode!r}")

    def __or__(self, other: KeepPolicy) -> UnionOf:
        return UnionOf((self, other))

    def kept(self, saved: Sequence[Saved]) -> set[str]:
        """Choose the names to keep."""
        sign = 1 if self.mode == "min" else -1
        known = [one for one in saved if math.isfinite(one.metrics.get(self.metric, math.nan))]
        ordered = sorted(known, key=lambda one: (sign * one.metrics[self.metric], -one.step))
        return {one.name for one in ordered[: self.n]}


@dataclass(frozen=True, slots=True)
class UnionOf:
    """Keep what one of the policies keeps."""

    policies: tuple[KeepPolicy, ...]

    def __post_init__(self) -> None:
        for policy in self.policies:
            if not isinstance(policy, Last | Best | UnionOf):
                text = "a policy of what to keep is Last(n), Best(metric, n) or some with |"
                raise UsageError(f"{text}, not {policy!r}")

    def __or__(self, other: KeepPolicy) -> UnionOf:
        return UnionOf((*self.policies, other))

    def kept(self, saved: Sequence[Saved]) -> set[str]:
        """Choose the names to keep."""
        return set().union(*(policy.kept(saved) for policy in self.policies))


KeepPolicy: TypeAlias = Last | Best | UnionOf


def _check_count(policy: str, n: int) -> None:
    if type(n) is not int or n < 1:
        raise UsageError(f"{policy}: n is a whole number from 1, not {n!r}")
