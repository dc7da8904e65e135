"""Schedules: the learning rate as a multiple of its first value, by the number of steps made.

An optimizer follows one: `optimizer.follow(CosineSchedule(1000))`. Every step then sets the learning rate of the next
one, and the optimizer's state dict says where in the schedule it is. Any function from the number of steps to a factor
is a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from ferro.errors import UsageError

Schedule: TypeAlias = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class ConstantSchedule:
    """The same factor at every step.

    Attributes:
        factor: the factor.
    """

    factor: float = 1.0

    def __call__(self, step: int) -> float:
        """Return the factor."""
        return self.factor


@dataclass(frozen=True, slots=True)
class LinearSchedule:
    """A straight line from `start` to `end` in `steps` steps, and `end` afterwards.

    Attributes:
        steps: the number of steps, at least 1.
        start: the factor at step 0.
        end: the factor from step `steps` on.
    """

    steps: int
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_steps(self, self.steps)

    def __call__(self, step: int) -> float:
        """Return the factor at a step."""
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True, slots=True)
class WarmUpSchedule:
    """A straight line up to 1 in `steps` steps, followed by another schedule, whose step 0 is at the top.

    Attributes:
        steps: the number of steps, at least 1.
        then: the schedule afterwards; a constant by default.
        start: the factor at step 0. The first step has no effect with 0.
    """

    steps: int
    then: Schedule = ConstantSchedule()
    start: float = 0.0

    def __post_init__(self) -> None:
        _check_steps(self, self.steps)
        check_schedule("WarmUpSchedule", self.then)

    def __call__(self, step: int) -> float:
        """Return the factor at a step."""
        if step < self.steps:
            return self.start + (1 - self.start) * step / self.steps
        return self.then(step - self.steps)


@dataclass(frozen=True, slots=True)
class CosineSchedule:
    """Half a period of a cosine from 1 down to `end` in `steps` steps, and `end` afterwards.

    Attributes:
        steps: the number of steps, at least 1.
        end: the last factor.

    Source: Loshchilov and Hutter, "SGDR", 2017, equation 5, without restarts.
    """

    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_steps(self, self.steps)

    def __call__(self, step: int) -> float:
        """Return the factor at a step."""
        return _cosine(1.0, self.end, min(step / self.steps, 1.0))


@dataclass(frozen=True, slots=True)
class StepSchedule:
    """A factor that is multiplied by `factor` at some steps.

    Attributes:
        every: the number of steps between two changes; or the steps at which it changes.
        factor: the factor of each change.
    """

    every: int | Sequence[int]
    factor: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.every, int):
            _check_steps(self, self.every)

    def __call__(self, step: int) -> float:
        """Return the factor at a step."""
        if isinstance(self.every, int):
            return self.factor ** (step // self.every)
        return self.factor ** sum(step >= change for change in self.every)


@dataclass(frozen=True, slots=True)
class OneCycleSchedule:
    """Up to 1 and down again by halves of a cosine, in `steps` steps; `end` afterwards.

    The optimizer's own learning rate is the greatest one.

    Attributes:
        steps: the number of steps, at least 1.
        warm_up: the part of the steps in which the factor rises, between 0 and 1.
        start: the factor at step 0.
        end: the factor at the last step.

    Source: Smith and Topin, "Super-Convergence", 2018; the shape is that of torch.optim.lr_scheduler.OneCycleLR.
    """

    steps: int
    warm_up: float = 0.3
    start: float = 1 / 25
    end: float = 1 / 25e4

    def __post_init__(self) -> None:
        _check_steps(self, self.steps)
        if not 0 < self.warm_up < 1:
            raise UsageError(f"OneCycleSchedule: warm_up must be between 0 and 1, got {self.warm_up}.")

    def __call__(self, step: int) -> float:
        """Return the factor at a step."""
        top, last = self.warm_up * self.steps - 1, self.steps - 1
        if step < top:
            return _cosine(self.start, 1.0, step / top)
        return _cosine(1.0, self.end, min((step - top) / (last - top), 1.0) if last > top else 1.0)


@dataclass(frozen=True, slots=True)
class ChainedSchedule:
    """Schedules one after the other; each begins at its own step 0.

    Attributes:
        parts: (schedule, number of its steps); the number of the last one may be None: it goes on.
    """

    parts: Sequence[tuple[Schedule, int | None]]

    def __post_init__(self) -> None:
        if not all(isinstance(part, Sequence) and len(part) == 2 for part in self.parts):
            raise UsageError(
                f"ChainedSchedule: every part is a pair (schedule, number of its steps), got {self.parts}."
            )
        for schedule, _ in self.parts:
            check_schedule("ChainedSchedule", schedule)
        counts = [count for _, count in self.parts]
        if not counts or any(count is None or count < 1 for count in counts[:-1]):
            raise UsageError(f"ChainedSchedule: every part but the last needs a number of steps, got {counts}.")

    def __call__(self, step: int) -> float:
        """Return the factor at a step."""
        begins = accumulate((count or 0 for _, count in self.parts), initial=0)
        begun = [(schedule, begin) for (schedule, _), begin in zip(self.parts, begins, strict=False) if begin <= step]
        schedule, begin = begun[-1]
        return schedule(step - begin)


def check_schedule(user: str, schedule: object) -> None:
    """Refuse what is no schedule, such as a number.

    Raises:
        UsageError: `schedule` cannot be called, or is a class.
    """
    if not callable(schedule) or isinstance(schedule, type):
        raise UsageError(
            f"{user}: {schedule!r} is no schedule. Give one such as CosineSchedule(1000), or a function from the "
            "number of steps to a factor."
        )


def _cosine(start: float, end: float, part: float) -> float:
    """Interpolate from `start` to `end` by half a cosine; `part` is from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def _check_steps(schedule: object, steps: int) -> None:
    if steps < 1:
        raise UsageError(f"{type(schedule).__name__}: the number of steps must be at least 1, got {steps}.")
