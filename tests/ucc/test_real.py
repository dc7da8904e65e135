"""ucc over a real libucc, ranks as processes: the kit that every backend has to pass, failing."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest

from ferro import CollectiveTimeout, GroupClosed, PeerLost, ProcessGroup, UnsupportedError
from ferro.errors import FerroError
from ferro_testing import conformance, run_ranks, run_ranks_outcomes
from ferro_testing.case import Case
from ferro_testing.samples import reductions
from ferro_ucc.abi import CollType
from ferro_ucc.operations import Operation

pytestmark = pytest.mark.ucc

UNSUPPORTED = {
    "send": "UCC has no messages between two ranks",
    "recv": "UCC has no messages between two ranks",
    "sendrecv": "UCC has no messages between two ranks",
    "shrink": "UCC cannot connect again without a rank",
}
CASE = Case(backend="ucc", world_sizes=(1, 2, 3), unsupported=UNSUPPORTED, timeout_s=30)
SHORT_S = 0.5
LATE_S = 3.5  # longer than closing takes, and many looks at the store


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_ucc_conforms(check):
    check(CASE)


def random_integers(rank: int, dtype: str, count: int) -> np.ndarray:
    random = np.random.default_rng(rank)
    return random.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, count, dtype, endpoint=True)


def reduce_random_integers(group: ProcessGroup) -> None:
    """UCC overflows as NumPy does, in every width and reduction, with many elements and few."""
    ufuncs = {
        "sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum,
        "band": np.bitwise_and, "bor": np.bitwise_or, "bxor": np.bitwise_xor,
    }  # fmt: skip
    for dtype in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
        for count in (5, 40_000):
            everyones = [random_integers(r, dtype, count) for r in range(group.world_size)]
            for op in reductions(dtype):
                wanted = ufuncs[op].reduce(everyones, dtype=dtype)
                given = everyones[group.rank]
                np.testing.assert_array_equal(group.all_reduce(given, op), wanted)
                result = group.reduce(given, 1, op)
                if group.rank == 1:
                    np.testing.assert_array_equal(result, wanted)
                sizes = [count - 2 * (group.world_size - 1)] + [2] * (group.world_size - 1)
                start = sum(sizes[: group.rank])
                part = group.reduce_scatter(given, op, sizes=sizes)
                np.testing.assert_array_equal(part, wanted[start:][: sizes[group.rank]])


def test_integers_overflow_as_in_numpy():
    run_ranks(reduce_random_integers, 3, backend="ucc", timeout_s=30)


def order_nan(group: ProcessGroup) -> None:
    given = np.full(70_000, float(group.rank))
    given[group.rank :: 5] = np.nan
    wanted = np.full(70_000, group.world_size - 1.0)
    for rank in range(group.world_size):
        wanted[rank::5] = np.nan
    np.testing.assert_array_equal(group.all_reduce(given, "max"), wanted)


def test_nan_goes_before_numbers_as_in_numpy():
    run_ranks(order_nan, 2, backend="ucc", timeout_s=30)


def pass_objects(group: ProcessGroup) -> object:
    told = group.broadcast_object({"step": 3} if group.rank == 1 else None, 1)
    return [told, group.all_gather_object("x" * group.rank), group.gather_object(group.rank, 0)]


def test_python_values_pass():
    results = run_ranks(pass_objects, 3, backend="ucc", timeout_s=30)
    assert results[0] == [{"step": 3}, ["", "x", "xx"], [0, 1, 2]]
    assert results[2] == [{"step": 3}, ["", "x", "xx"], None]


def stall(group: ProcessGroup) -> object:
    """Leave rank 2 out, with a group of the others beside that goes on."""
    pair = group.subgroup([0, 1]) if group.rank < 2 else None
    last = group.subgroup([2, 0]) if group.rank != 1 else None
    group.all_reduce(np.ones(3))
    told: object = None
    if group.rank < 2:
        try:
            group.all_reduce(np.ones(3), timeout_s=SHORT_S)
        except CollectiveTimeout as error:
            told = [list(error.arrived), list(error.missing), error.seconds]
        with pytest.raises(GroupClosed):
            group.barrier()
        assert pair is not None
        assert pair.all_reduce(np.array(1.0)) == 2
    if last is not None:  # rank 2 has stayed away until the others have failed
        assert last.all_gather(np.array(group.rank)).tolist() == [2, 0]
    return told


def test_a_rank_that_stalls_is_named_and_other_groups_go_on():
    results = run_ranks(stall, 3, backend="ucc", timeout_s=30)
    assert results == [[[0, 1], [2], SHORT_S]] * 2 + [None]


def use_thrice(group: ProcessGroup) -> None:
    """What a dead rank sent last may still arrive."""
    for _ in range(3):
        group.all_reduce(np.ones(300_000))


def die(group: ProcessGroup) -> object:
    group.all_reduce(np.ones(3))
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        use_thrice(group)
    except FerroError as error:
        return [type(error).__name__, error.peer]
    return None


def test_a_rank_that_died_is_named_and_nobody_hangs_at_the_end():
    outcomes = run_ranks_outcomes(die, 3, backend="ucc", timeout_s=20)
    told = [outcome.result for outcome in outcomes if outcome.rank != 1]
    assert told == [["PeerLost", 1]] * 2, [o.describe() for o in outcomes]


def die_in_a_group(group: ProcessGroup) -> object:
    """Of the world 0, 1, 2 the group [2, 1] loses rank 2; the pair [1, 0] goes on."""
    pair = group.subgroup([1, 0]) if group.rank != 2 else None
    odd = group.subgroup([2, 1]) if group.rank != 0 else None
    group.all_reduce(np.ones(3))
    told: object = None
    if odd is not None:
        odd.all_reduce(np.ones(3))
        if group.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(PeerLost) as caught:
            use_thrice(odd)
        told = caught.value.peer
    assert pair is not None
    assert pair.all_reduce(np.array(1.0)) == 2
    return told


def test_a_rank_that_died_is_named_by_its_rank_in_the_group_and_others_go_on():
    outcomes = run_ranks_outcomes(die_in_a_group, 3, backend="ucc", timeout_s=20)
    assert [outcome.result for outcome in outcomes] == [None, 0, None]
    assert [outcome.ok for outcome in outcomes] == [True, True, False]


def leave_early(group: ProcessGroup) -> object:
    """Rank 2 gives its part of a sum, closes and exits; rank 1 comes seconds after that."""
    team = group.backend._team
    run = team.run

    def late(operation: Operation, deadline: float) -> None:
        if operation.args.coll_type == CollType.REDUCE:
            threading.Event().wait(LATE_S)
        run(operation, deadline)

    if group.rank == 1:
        team.run = late
    result = group.reduce(np.array(group.rank + 1), 0)
    return None if result is None else int(result)


def test_a_rank_that_left_in_good_order_is_not_lost():
    assert run_ranks(leave_early, 3, backend="ucc", timeout_s=20) == [6, None, None]


def make_groups_in_another_order(group: ProcessGroup) -> None:
    """Groups are made when they are first used, so that their order need not be the same."""
    members = [[0, 1, 2], [2, 1, 0], [1, 2, 0]]
    order = sorted(members, key=lambda chosen: chosen[0] != group.rank)  # its own one first
    groups = [(chosen, group.subgroup(chosen)) for chosen in order]
    works = [(chosen, made.all_gather(np.array(group.rank), async_op=True)) for chosen, made in groups]
    for chosen, work in works:
        assert work.wait().tolist() == chosen


def test_groups_are_made_in_any_order():
    run_ranks(make_groups_in_another_order, 3, backend="ucc", timeout_s=30)


def refuse_transfers(group: ProcessGroup) -> None:
    peer = 1 - group.rank
    with pytest.raises(UnsupportedError, match="HybridBackend"):
        group.send(np.ones(1), peer)
    assert group.all_reduce(np.array(1)) == 2


def test_transfers_are_refused_with_what_to_do():
    run_ranks(refuse_transfers, 2, backend="ucc", timeout_s=30)


def test_fixed_algorithms_and_options_are_refused():
    for options in ({"algorithms": {"all_reduce": "ring"}}, {"backend_options": {"x": 1}}):
        outcomes = run_ranks_outcomes(refuse_transfers, 1, backend="ucc", timeout_s=20, init_options=options)
        assert outcomes[0].error_type in ("UnsupportedError", "UsageError")
        assert "ucc" in outcomes[0].error_text
