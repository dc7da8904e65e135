"""When to save: every so many steps or minutes, or continuously.

Steps are counted alike on all ranks, so a policy of steps needs no communication. Time and the end of a save are not
the same on all ranks: there the ranks agree (see `agreement`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ferro import UsageError
from ferro_checkpoint.checkpointer.agreement import BUSY, DUE, MEMORY_DUE


def is_positive(number: object) -> bool:
    """Say whether this is a finite number greater than 0."""
    return isinstance(number, int | float | np.integer | np.floating) and bool(0 < number < math.inf)


@dataclass(frozen=True, slots=True)
class Every:
    """Save every `steps` steps, or every `minutes` minutes by rank 0's clock; one of them is given."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise UsageError("Every: give either steps or minutes; Every(steps=500) | Every(minutes=10) does both")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise UsageError(f"Every: steps is a whole number from 1, not {self.steps!r}")
        if self.minutes is not None and not is_positive(self.minutes):
            raise UsageError(f"Every: minutes is a positive number, not {self.minutes!r}")

    def __or__(self, other: SavePolicy) -> AnyOf:
        return AnyOf((self, other))


@dataclass(frozen=True, slots=True)
class Continuous:
    """Begin a save whenever the last one has ended on all ranks."""

    def __or__(self, other: SavePolicy) -> AnyOf:
        return AnyOf((self, other))


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Save when one of the policies says so."""

    policies: tuple[SavePolicy, ...]

    def __post_init__(self) -> None:
        for policy in self.policies:
            _flattened(policy)

    def __or__(self, other: SavePolicy) -> AnyOf:
        return AnyOf((*self.policies, other))


SavePolicy: TypeAlias = "Every | Continuous | AnyOf"


class SaveSchedule:
    """A policy at work: it knows the step before and the time of the last save.

    Attributes:
        needs_agreement: whether the ranks must agree on what is due.
        continuous: whether a save is due as soon as none is being written.
    """

    def __init__(self, policy: SavePolicy | None) -> None:
        policies = _flattened(policy)
        self._steps = [one.steps for one in policies if isinstance(one, Every) and one.steps is not None]
        minutes = [one.minutes for one in policies if isinstance(one, Every) and one.minutes is not None]
        self._seconds = 60.0 * min(minutes) if minutes else None
        self.continuous = any(isinstance(one, Continuous) for one in policies)
        self.needs_agreement = self.continuous or self._seconds is not None
        self._before: int | None = None
        self._saved_at = time.monotonic()

    def due_by_step(self, step: int) -> bool:
        """Say whether a multiple of the policy's steps lies after the step before and not after this one."""
        before = max(step - 1, 0) if self._before is None else self._before
        self._before = step
        return any(step // steps > before // steps for steps in self._steps)

    def due_by_clock(self) -> bool:
        """Say whether this rank's clock says that a save is due."""
        return self._seconds is not None and time.monotonic() - self._saved_at >= self._seconds

    def began(self) -> None:
        """Note that a save begins."""
        self._saved_at = time.monotonic()

    def resumed(self, step: int) -> None:
        """Note that training goes on after this step."""
        self._before = step


class SaveSchedules:
    """The policies of a checkpointer: for its directory, and for the ranks' memories."""

    def __init__(self, every: SavePolicy | None, in_memory: SavePolicy | None) -> None:
        self._every, self._in_memory = SaveSchedule(every), SaveSchedule(in_memory)
        self.needs_agreement = self._every.needs_agreement or self._in_memory.needs_agreement

    def due(self, step: int, agreed: bytes | None) -> tuple[bool, bool]:
        """Say which saves are due after this step, given what the ranks have agreed on."""
        disk, memory = self._every.due_by_step(step), self._in_memory.due_by_step(step)
        if agreed is None:
            return disk, memory
        idle = not agreed[BUSY]
        disk = disk or agreed[DUE] > 0 or (idle and self._every.continuous)
        return disk, memory or agreed[MEMORY_DUE] > 0 or (idle and self._in_memory.continuous)

    def due_by_clock(self) -> tuple[bool, bool]:
        """Say which saves are due by this rank's clock."""
        return self._every.due_by_clock(), self._in_memory.due_by_clock()

    def began(self, *, disk: bool) -> None:
        """Note that a save begins; each goes into memory, too, if that is wanted."""
        self._in_memory.began()
        if disk:
            self._every.began()

    def resumed(self, step: int) -> None:
        """Note that training goes on after this step."""
        self._every.resumed(step)
        self._in_memory.resumed(step)


def _flattened(policy: SavePolicy | None) -> list[Every | Continuous]:
    if policy is None:
        return []
    if isinstance(policy, AnyOf):
        return [one for part in policy.policies for one in _flattened(part)]
    if not isinstance(policy, Every | Continuous):
        raise UsageError(f"a policy is Every(steps=…), Every(minutes=…), Continuous() or some with |, not {policy!r}")
    return [policy]
