"""Several checks in one run of the ranks, for starting processes takes most of the time.

Each check is called twice: first with a runner that only notes which functions it wants run, and,
when one run of the ranks has run all of them, with one that hands out the outcomes.
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
    """Run at once all functions that these checks want run; return for each check the case to call it with.

    The checks must be such as run functions that return findings, without `deterministic`.
    """
    wanted: list[tuple[Check, list[object]]] = []
    for check in checks:
        check(replace(case, runner=_noting(check, wanted)))
    items = [item for _, item in wanted]
    ranks = case.outcomes(run_bundle, world_size, items)
    outcomes = [[_outcome(rank, index) for rank in ranks] for index in range(len(items))]
    cases = {}
    for check in checks:
        own = [outcomes[index] for index, (by, _) in enumerate(wanted) if by is check]
        cases[check] = replace(case, runner=_handing_out(own))
    return cases


def run_bundle(group: ProcessGroup, items: Sequence[Any]) -> list[dict[str, object]]:
    """Run the functions of `items`, place and arguments of each; return the outcomes."""
    results: list[dict[str, object]] = []
    for place, args in items:
        outcome, _ = attempt(load(place), group, args)
        results.append({"result": outcome.result, "error_type": outcome.error_type, "error_text": outcome.error_text})
    return results


def _noting(check: Check, wanted: list[tuple[Check, list[object]]]) -> Callable[..., list[Outcome]]:
    """Return a runner that runs nothing, and says that nothing was wrong."""

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


def _handing_out(outcomes: Sequence[list[Outcome]]) -> Callable[..., list[Outcome]]:
    """Return a runner that hands out the outcomes of the runs, in the order in which they were noted."""
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
    """Return the outcome of one function on a rank, which is the rank's own end when it died."""
    if not rank.ok or not isinstance(rank.result, list):
        return rank
    return Outcome(rank=rank.rank, **rank.result[index])
