"""The two ways in which FSDP runs its operations, shared out among the cases of a test."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from ferro_strategies.fsdp import ShardingStrategy

WAYS = ("beside", "at once")


def shared_out(**values: Sequence[object]) -> pytest.MarkDecorator:
    """Parametrize a test with the product of values, each case with one of both ways.

    Each value meets both ways, as neighbouring cases differ in theirs. FULL_SHARD, which uses most of FSDP, has both
    in every case.
    """
    cases = []
    for places in itertools.product(*(range(len(some)) for some in values.values())):
        case = [some[place] for some, place in zip(values.values(), places, strict=True)]
        ways = WAYS if ShardingStrategy.FULL_SHARD in case else [WAYS[sum(places) % 2]]
        cases += [(*case, way) for way in ways]
    return pytest.mark.parametrize((*values, "both_ways"), cases, indirect=["both_ways"], ids=_name)


def _name(value: object) -> str:
    return getattr(value, "__name__", str(value))
