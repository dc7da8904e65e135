"""Conformance of shrink(): survivors of a dead rank continue in a new group."""

from __future__ import annotations

import numpy as np

from ferro import ProcessGroup
from ferro.errors import CollectiveTimeout, PeerLost
from ferro_testing.case import Case, require
from ferro_testing.killing import DeathNoticedLate, end_this_rank, patience_s, require_survivors
from ferro_testing.samples import Findings, reduced, sample

_SHRINK_S = 10.0
_LATE = "only the deadline told that a rank had died"


def check_shrink(case: Case) -> None:
    """After a rank was killed, the others continue in shrink()'s group; twice if there are four ranks.

    Raises:
        DeathNoticedLate: the survivors noticed the death only by their deadline, so none shrank.
    """
    if case.largest < 2 or not case.supports("shrink", "lost_peer", "all_reduce", "all_gather"):
        return
    lost = (1, case.largest - 1) if case.largest >= 4 else (1,)
    outcomes = case.outcomes(_shrink_after_deaths, case.largest, lost, patience_s(case.timeout_s))
    what = f"shrink after ranks {list(lost)} of {case.largest} of {case.backend} were killed"
    require_survivors(what, outcomes, lost)
    require(what, outcomes, lost)
    if all(outcome.result == [_LATE] for outcome in outcomes if outcome.rank not in lost):
        raise DeathNoticedLate(what, lost[0])
    found: list[str] = []
    for outcome in outcomes:
        if outcome.rank not in lost:
            assert isinstance(outcome.result, list), "a check returns a list of findings"
            found += map(str, outcome.result)
    assert not found, "\n".join([f"{what}:", *found])


def _shrink_after_deaths(group: ProcessGroup, lost: list[int], allowed_s: float) -> list[str]:
    """Lose the ranks `lost` of the world, one after the other; compute with the rest each time."""
    found = Findings(group.rank)
    me, left = group.rank, list(range(group.world_size))
    for victim in lost:
        lost_as = left.index(victim)
        try:
            if not _survives(group, lost_as, allowed_s, found):
                return found.report()
        except CollectiveTimeout as error:
            if victim == lost[0] and error.missing == (lost_as,):
                return [_LATE]
            raise
        left.remove(victim)
        group = group.shrink(timeout_s=_SHRINK_S)
        found.true(group.global_ranks == tuple(left), f"shrink: has {group.global_ranks}")
        _compute(group, left, me, found)
    return found.report()


def _survives(group: ProcessGroup, victim: int, allowed_s: float, found: Findings) -> bool:
    """On rank `victim`, die; on other ranks, use the group until the death is noticed."""
    try:
        for _ in range(3):  # the victim's last messages may arrive or be lost
            group.all_reduce(np.ones(3), timeout_s=allowed_s)
            if group.rank == victim:
                end_this_rank()
    except PeerLost as error:
        found.true(error.peer == victim, f"peer is {error.peer}, not {victim}")
        return True
    found.note(f"all_reduce goes on without rank {victim}, which is dead")
    return False


def _compute(group: ProcessGroup, left: list[int], me: int, found: Findings) -> None:
    """Run collectives in the group of the survivors, and compare the results."""
    n = len(left)
    found.true(group.world_size == n and group.rank == left.index(me), "shrink: wrong rank or size")
    for shape in ((7,), (70_000,)):
        everyones = [sample(rank, shape, "float64") for rank in left]
        total = group.all_reduce(sample(me, shape, "float64"))
        found.same(total, reduced(everyones, "sum"), f"all_reduce of {list(shape)} among {n} left")
        together = group.all_gather(sample(me, shape, "float64"))
        found.same(together, np.concatenate(everyones), f"all_gather of {list(shape)} after shrink")
