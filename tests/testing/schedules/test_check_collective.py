"""The kit for authors of algorithms: right ones pass, and every way to be wrong is told."""

from dataclasses import replace

import pytest

from ferro.collectives.builtin import BUILTIN
from ferro.collectives.schedule import CollectiveInfo, Schedule
from ferro.errors import PluginError, UsageError
from ferro_testing.conformance import check_collective


@pytest.mark.parametrize("info", BUILTIN, ids=lambda info: f"{info.collective}-{info.algorithm}")
def test_our_own_algorithms_conform(info):
    check_collective(info, (1, 2, 3, 5))


def nobody_talks(rank, world_size, root):
    return Schedule(chunks=1, rounds=())


def offered(collective, build, **options):
    return CollectiveInfo(collective=collective, algorithm="mine", build=build, **options)


def test_a_wrong_algorithm_is_told_with_the_ranks():
    with pytest.raises(PluginError, match="by nobody_talks with 2 ranks"):
        check_collective(offered("all_reduce", nobody_talks))
    with pytest.raises(UsageError, match="no collective 'all_sum'"):
        check_collective(offered("all_sum", nobody_talks))


def test_a_claim_that_does_not_hold_is_told():
    [ring] = [info for info in BUILTIN if (info.collective, info.algorithm) == ("all_reduce", "ring")]
    with pytest.raises(PluginError, match="combines_once=True, but with 3 ranks"):
        check_collective(replace(ring, combines_once=True), (2, 3))
