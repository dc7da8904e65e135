"""Placements are checked when they are made and when they are used."""

from __future__ import annotations

import pytest

from ferro import UsageError
from ferro_strategies.dtensor import Partial, Shard
from ferro_strategies.dtensor.placement import checked_placements

S0, S2, P = Shard(0), Shard(2), Partial()


@pytest.mark.parametrize(
    ("placements", "message"),
    [
        ((S0,), "1 placements for a mesh of 2 axes"),
        ((S0, S2), "dims go from 0 to 1"),
        ((S0, Shard(-3)), "dims go from 0 to 1"),
        ((P, Partial("max")), "mixes reductions"),
        ((S0, "shard"), "not 'shard'"),
    ],
)
def test_wrong_placements_are_refused(placements, message):
    with pytest.raises(UsageError, match=f"(?i){message}"):
        checked_placements(placements, 2, 2, "distribute")


def test_wrong_values_are_refused():
    with pytest.raises(UsageError, match="For a mean"):
        Partial("mean")
    with pytest.raises(UsageError, match="number of a dim"):
        Shard("rows")


def test_dims_are_counted_from_the_front():
    assert checked_placements([Shard(-1), S0], 2, 3, "distribute") == (S2, S0)
