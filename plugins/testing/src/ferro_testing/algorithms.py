"""Conformance of an algorithm that a plugin offers: proven by the checker, then run with data."""

from __future__ import annotations

from collections.abc import Sequence

from ferro import ProcessGroup
from ferro.collectives import Choice, CollectiveInfo
from ferro.errors import PluginError
from ferro.simulated import simulate
from ferro_testing.samples import Findings
from ferro_testing.schedules import check
from ferro_testing.single_call import call_once, expected_result

_ROOTED = ("broadcast", "reduce", "gather", "scatter")
_COUNTS = (1, 7, 5000)
_RUN_S = 30.0


def check_collective(info: CollectiveInfo, world_sizes: Sequence[int] = (1, 2, 3, 4, 5, 8)) -> None:
    """Prove an algorithm right with every root, then run it on simulated ranks and compare the results.

    Raises:
        PluginError: it is wrong, or lacks a property that it claims; names world size, rank and round.
        AssertionError: a result of running it is wrong.
        UsageError: there is no such collective.
    """
    what = f"algorithm {info.algorithm!r} for {info.collective!r}"
    for n in world_sizes:
        for root in range(n if info.collective in _ROOTED else 1):
            proof = check(info.collective, info.build, n, root)
            if info.combines_once and not proof.combines_once:
                raise PluginError(
                    f"{what} is offered with combines_once=True, but with {n} ranks some result "
                    "is combined in more than one round: offer it with combines_once=False"
                )
            if info.collective == "all_reduce" and not proof.same_everywhere:
                raise PluginError(
                    f"{what} combines in another order on one rank than on another with {n} "
                    "ranks: their results would differ in the last bits"
                )
    for n in world_sizes:
        _run(info, n, what)


def _run(info: CollectiveInfo, world_size: int, what: str) -> None:
    """Run an algorithm on ranks that are threads, and compare the results bit for bit."""

    def on_rank(group: ProcessGroup) -> list[str]:
        group.backend.choice = Choice(fixed={info.collective: info})
        found = Findings(group.rank)
        if info.collective == "barrier":
            group.barrier()
            return []
        for count in _COUNTS:
            result = call_once(group, info.collective, "float64", count=count)
            wanted = expected_result(group, info.collective, "float64", count=count)
            if wanted is not None:
                found.same(result, wanted, f"{what} with {count} elements a block")
        return found.report()

    found = simulate(on_rank, world_size, run_timeout_s=_RUN_S)
    wrong = [line for lines in found for line in lines or ()]
    assert not wrong, "\n".join([f"{what} on {world_size} ranks:", *wrong])
