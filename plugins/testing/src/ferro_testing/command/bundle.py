"""Several checks in one run of the ranks, since starting processes takes most of the time.

Each check is called twice: first with a runner that only records the functions that the check
passes to it, and, after one run of the ranks has run all of them, with a runner that replays the
outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from ferro import ProcessGroup
from ferro_testing.case import Case, attempt
from ferro_testing.functions import load, locate
from ferro_testing.outcome import Outcome

Check: TypeAlias = Callable[[Case], None]


def bundled(checks: Sequence[Check], case: Case, world_size: int) -> dict[Check, Case]:
    """Run all functions of these checks at once; return for each check the case to call it with.

    The functions of these checks must return findings, and run without `deterministic`.
    """
    wanted: list[tuple[Check, list[object]]] = []
    for check in checks:
        check(replace(case, runner=_recording_runner(check, wanted)))
    items = [item for _, item in wanted]
    ranks = case.outcomes(run_bundle, world_size, items)
    outcomes = [[_outcome(rank, index) for rank in ranks] for index in range(len(items))]
    cases = {}
    for check in checks:
        own = [outcomes[index] for index, (by, _) in enumerate(wanted) if by is check]
        cases[check] = replace(case, runner=_replaying_runner(own))
    return cases


def run_bundle(group: ProcessGroup, items: Sequence[Any]) -> list[dict[str, object]]:
    """Run the functions of `items`, each given by place and arguments; return the outcomes."""
    results: list[dict[str, object]] = []
    for place, args in items:
        outcome, _ = attempt(load(place), group, args)
        results.append({"result": outcome.result, "error_type": outcome.error_type, "error_text": outcome.error_text})
    return results


def _recording_runner(check: Check, wanted: list[tuple[Check, list[object]]]) -> Callable[..., list[Outcome]]:
    """Make a runner that records the function, runs nothing, and reports no mistake."""

    def runner(
        function: Callable[..., object],
        world_size: int,
        args: Sequence[object],
        *,
        timeout_s: float,
        deterministic: bool,
    ) -> list[Outcome]:
        assert not deterministic, "such a world is another one"
        wanted.append((check, [locate(function), list(args)]))
        return [Outcome(rank=rank, result=[]) for rank in range(world_size)]

    return runner


def _replaying_runner(outcomes: Sequence[list[Outcome]]) -> Callable[..., list[Outcome]]:
    """Make a runner that replays the outcomes of the runs, in the order in which they were recorded."""
    left = iter(outcomes)

    def runner(
        function: Callable[..., object],
        world_size: int,
        args: Sequence[object],
        *,
        timeout_s: float,
        deterministic: bool,
    ) -> list[Outcome]:
        return next(left)

    return runner


def _outcome(rank: Outcome, index: int) -> Outcome:
    """Return the outcome of one function on a rank; of a rank that died, the rank's own outcome."""
    if not rank.ok or not isinstance(rank.result, list):
        return rank
    return Outcome(rank=rank.rank, **rank.result[index])
