"""Groups that fail: one cause on every rank, a dead group that says so, and nobody hangs."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ferro.errors import CollectiveMismatch, CollectiveTimeout, GroupClosed, PeerLost, RendezvousError, UnsupportedError
from ferro.simulated import Fault, simulate
from ferro_testing import run_ranks_outcomes


def caught(call):
    """Return the error that a call raises."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - a test looks at it
        return error
    raise AssertionError("nothing was raised")


def test_a_mismatch_names_both_calls_on_every_rank():
    def work(group):
        root = int(group.rank == 2)
        return caught(lambda: group.broadcast(np.ones(4, np.int8), root))

    errors = simulate(work, 3, timeout_s=5)
    assert {type(error) for error in errors} == {CollectiveMismatch}
    assert len({str(error) for error in errors}) == 1
    text = str(errors[0])
    assert "called broadcast(4 x int8, root=0, shape 4)" in text
    assert "called broadcast(4 x int8, root=1, shape 4)" in text
    assert "rank 2 called" in text
    assert "on group 'world' (#0)" in text
    assert [error.rank for error in errors] == [0, 1, 2]
    assert {error.op for error in errors} == {"broadcast"}


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (lambda g: g.barrier(), lambda g: g.all_reduce(1)),
        (lambda g: g.all_reduce(1), lambda g: g.all_reduce(1.0)),
        (lambda g: g.all_reduce([1, 2]), lambda g: g.all_reduce([[1, 2]])),
        (lambda g: g.all_reduce(1.0, "max"), lambda g: g.all_reduce(1.0, np.hypot)),
        (lambda g: g.all_gather([1], sizes=[1, 1]), lambda g: g.all_gather([1])),
        (lambda g: g.gather([1], 0), lambda g: g.gather([1], 1)),
        (lambda g: g.scatter([1, 2], 0), lambda g: g.scatter([1, 2], 1)),
        (lambda g: g.all_gather_object(1), lambda g: g.broadcast_object(1)),
        (lambda g: g.reduce_scatter([1, 2, 3], sizes=[1, 2]), lambda g: g.reduce_scatter([1, 2, 3], sizes=[2, 1])),
        (lambda g: g.all_to_all([1, 2], send_sizes=[1, 1], recv_sizes=[1, 1]), lambda g: g.all_to_all([1, 2])),
    ],
)
def test_every_kind_of_difference_is_a_mismatch(mine, theirs):
    def work(group):
        return caught(lambda: (theirs if group.rank else mine)(group))

    errors = simulate(work, 2, timeout_s=5)
    assert {type(error) for error in errors} == {CollectiveMismatch}, errors
    assert len({str(error) for error in errors}) == 1


def test_only_a_group_that_is_well_is_left_with_patience():
    def work(group):
        left = []
        group._on_close = lambda *how: left.append(how)
        if group.name == "world":
            group.all_reduce(1)
        return left, group

    def well(group):
        left, group = work(group)
        group.close()
        return left

    def dead(group):
        left, group = work(group)
        caught(lambda: group.all_reduce(np.ones(2 + group.rank)))
        group.close()
        return left

    def abandoned(group):
        left, group = work(group)
        group.abandon()
        return left

    assert simulate(well, 2, timeout_s=5) == [[(10.0, True)]] * 2
    assert simulate(dead, 2, timeout_s=5) == [[(2.0, True)]] * 2
    assert simulate(abandoned, 1, timeout_s=5) == [[(2.0, False)]]


def test_a_dead_group_says_so_and_why():
    def work(group):
        first = caught(lambda: group.all_reduce(np.ones(2 + group.rank)))
        later = caught(lambda: group.all_reduce(np.ones(2)))
        assert type(later) is GroupClosed
        assert later.__cause__ is first
        assert str(later) == f"all_reduce on group 'world': the group died earlier: {first}"
        assert "dead" in repr(group)
        return type(first)

    assert simulate(work, 2, timeout_s=5) == [CollectiveMismatch] * 2


def test_operations_that_were_outstanding_end_when_the_group_dies():
    issued = threading.Barrier(4)

    def hold(a, b, out):
        """Let nothing go on before both ranks have issued everything."""
        issued.wait(5)
        np.add(a, b, out=out)

    def work(group):
        good = group.all_reduce(1, async_op=True)
        waiting = group.all_reduce(1, hold, async_op=True)
        bad = group.all_reduce(np.ones(1 + group.rank), async_op=True)
        after = [group.all_reduce(1, async_op=True) for _ in range(3)]
        issued.wait(5)
        assert good.wait() == 2
        assert waiting.wait() == 2
        first = caught(bad.wait)
        assert caught(bad.wait) is first
        return [type(first), *(type(caught(work.wait)) for work in after)]

    for kinds in simulate(work, 2, timeout_s=5):
        assert kinds == [CollectiveMismatch, GroupClosed, GroupClosed, GroupClosed]


def test_a_timeout_names_the_missing_rank_and_where_another_one_was():
    done = threading.Event()
    arrived = threading.Barrier(4)

    def work(group):
        group.barrier()
        if group.rank == 3:
            arrived.wait(5)
            done.wait(5)
            return None
        if group.rank == 2:
            arrived.wait(5)
            error = caught(lambda: group.recv(np.empty(1), 3))
        else:
            arrived.wait(5)
            error = caught(lambda: group.all_reduce(np.ones(3), timeout_s=0.3))
        if group.rank == 0:
            done.set()
        return error

    *errors, nothing = simulate(work, 4, timeout_s=5)
    assert nothing is None
    assert {type(error) for error in errors} == {CollectiveTimeout}
    assert len({str(error) for error in errors}) == 1
    text = str(errors[0])
    assert "all_reduce #1 on group 'world' did not finish within 0.3 s" in text
    assert "arrived: rank 0, 1; did not arrive: rank 2 (host simulated), which was in recv" in text
    assert ", rank 3 (host simulated)." in text
    assert "Read rank 3's log first" in text
    for error in errors:
        assert (error.missing, error.arrived) == ((2, 3), (0, 1))
        assert isinstance(error, TimeoutError)


def test_a_killed_rank_is_lost_to_all_others():
    def work(group):
        return caught(lambda: [group.all_reduce(1) for _ in range(50)])

    errors = simulate(work, 3, faults=[Fault(rank=0, after=9)], timeout_s=5)
    assert errors[0] is None
    assert {type(error) for error in errors[1:]} == {PeerLost}
    assert {(error.peer, error.host) for error in errors[1:]} == {(0, "simulated")}
    assert len({str(error) for error in errors[1:]}) == 1
    assert "rank 0 (host simulated) of 3 is gone" in str(errors[1])
    assert "Read rank 0's log first" in str(errors[1])


def test_a_rank_that_leaves_early_is_lost():
    def work(group):
        if group.rank == 0:
            return None
        return caught(group.barrier)

    errors = simulate(work, 3, timeout_s=5)
    assert [type(error) for error in errors[1:]] == [PeerLost, PeerLost]


def test_an_error_in_a_users_reduction_kills_the_group_everywhere():
    def work(group):
        def divide(a, b, out):
            if group.rank == 1:
                raise ZeroDivisionError("by the user")
            np.add(a, b, out=out)

        # Large enough that every rank reduces a part.
        return caught(lambda: [group.all_reduce(np.ones(50_000), divide) for _ in range(2)])

    errors = simulate(work, 3, timeout_s=5)
    assert [type(error) for error in errors] == [GroupClosed, ZeroDivisionError, GroupClosed]
    assert all("rank 1 of 3: ZeroDivisionError: by the user" in str(errors[rank]) for rank in (0, 2))
    assert "the function given as op, " in errors[1].__notes__[0]
    assert "all_reduce #0 on group 'world', which can no longer be used" in errors[1].__notes__[1]


def test_abort_wakes_every_rank_and_names_who_did_it():
    waiting = threading.Barrier(3)

    def work(group):
        waiting.wait(5)
        if group.rank == 2:
            group.abort()
            return caught(group.barrier)
        return caught(group.barrier)

    errors = simulate(work, 3, timeout_s=5)
    assert {type(error) for error in errors} == {GroupClosed}
    assert all("aborted by rank 2 (host simulated)" in str(error) for error in errors[:2])
    assert "was aborted" in str(errors[2])


def test_a_subgroup_dies_alone():
    def work(group):
        inner = group.subgroup(range(3))
        error = caught(lambda: inner.all_reduce(np.ones(1 + inner.rank)))
        return type(error), int(group.all_reduce(1))

    assert simulate(work, 3, timeout_s=5) == [(CollectiveMismatch, 3)] * 3


def test_a_subgroup_that_its_first_rank_does_not_make_is_an_error():
    done = threading.Event()

    def work(group):
        if group.rank == 0:
            done.wait(5)
            return None
        error = caught(lambda: group.subgroup([0, 1], timeout_s=0.1))
        done.set()
        return error

    error = simulate(work, 2, timeout_s=5)[1]
    assert type(error) is RendezvousError
    assert "subgroup (0, 1): rank 0 did not create it within 0.1 s" in str(error)


def test_leaving_the_block_by_an_error_releases_the_others_at_once():
    def work(group):
        if group.rank == 0:
            group.all_reduce(1, async_op=True)  # never ends: the others do not come
            raise RuntimeError("the cause")
        return caught(lambda: group.recv(np.empty(1), 0))

    with pytest.raises(RuntimeError, match="the cause"):
        simulate(work, 3, timeout_s=30, run_timeout_s=10)


def test_a_reduction_that_refuses_in_the_middle_ends_the_group_and_not_only_the_call():
    def refuse(a, b, out):
        raise UnsupportedError("not these numbers")

    def work(group):
        reduction = refuse if group.rank == 0 else np.hypot  # which reduces for all
        first = caught(lambda: group.all_reduce(np.ones(5), reduction))
        return first, caught(group.barrier)

    for rank, (first, then) in enumerate(simulate(work, 3, timeout_s=5)):
        assert type(first) is (GroupClosed if rank else RuntimeError)
        assert "refuse, raised UnsupportedError: not these numbers" in str(first)
        assert isinstance(then, GroupClosed)


def test_a_mismatch_shows_whole_calls_and_the_lines_of_the_program():
    def work(group):
        if group.rank == 0:
            return caught(lambda: group.all_gather(np.ones((3, 1)), sizes=[3, 20, 300, 4000]))  # first line
        return caught(lambda: group.all_gather_object("x"))  # second line

    text = str(simulate(work, 4, timeout_s=5)[0])
    calls = "all_gather(4323 x float64, sizes 3,20,300,4000 of shape 1) #0", "all_gather_object (all_gather("
    assert all(call in text for call in calls)
    assert all(f":{line_of(words)}" in text for words in ("first line", "second line"))


def line_of(words):
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# {words}"))


def test_a_rank_that_is_done_is_not_taken_for_a_dead_one():
    outcomes = run_ranks_outcomes(do_as_many_steps_as_rank, 2, backend="gloo", timeout_s=60)
    assert [outcome.error_type for outcome in outcomes] == ["", "PeerLost"]
    text = outcomes[1].error_text
    assert "rank 0 (host " in text
    assert "left the group in good order after 3 collectives; this is number 4 here" in text
    assert "different numbers of batches?" in text


def do_as_many_steps_as_rank(group):
    for _ in range(3 + group.rank):
        group.all_reduce(1)


def test_a_rank_that_leaves_after_an_error_says_which():
    outcomes = run_ranks_outcomes(raise_on_rank_1, 2, backend="gloo", timeout_s=60)
    assert [outcome.error_type for outcome in outcomes] == ["PeerLost", "ValueError"]
    assert "rank 1 (host " in outcomes[0].error_text
    assert "left after an error of its own (ValueError: bad data in shard 1)" in outcomes[0].error_text


def raise_on_rank_1(group):
    if group.rank == 1:
        raise ValueError("bad data in shard 1")
    group.all_reduce(1)


def test_a_rank_that_leaves_because_of_a_death_is_not_named_as_dead():
    # Rank 1 learns in one group that rank 2 is dead, and leaves; rank 0 waits for it in another group of all.
    outcomes = run_ranks_outcomes(learn_of_a_death_elsewhere, 3, backend="gloo", timeout_s=60)
    assert [outcome.error_type for outcome in outcomes] == ["", "PeerLost", "Killed"]
    assert outcomes[0].result[0] == 2, outcomes[0].result
    assert "rank 2" in outcomes[1].error_text


def learn_of_a_death_elsewhere(group):
    pair = group.subgroup([1, 2]) if group.rank else None
    everyone = group.subgroup([0, 1, 2], name="everyone")
    group.barrier()
    if group.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if pair is not None:
        pair.all_reduce(1)
    try:
        everyone.recv(np.empty(1), 1)
    except PeerLost as error:
        return [error.peer, str(error)]


def test_a_rank_that_has_handled_a_death_still_ends_in_good_order():
    outcomes = run_ranks_outcomes(go_on_without_rank_2, 3, backend="gloo", timeout_s=60)
    assert [outcome.error_type for outcome in outcomes] == ["", "PeerLost", "Killed"]
    assert "left the group in good order after 1 collectives; this is number 2 here" in outcomes[1].error_text


def go_on_without_rank_2(group):
    group.barrier()
    if group.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLost):
        group.all_reduce(1)
    rest = group.shrink(timeout_s=20)
    for _ in range(1 + rest.rank):
        rest.all_reduce(1)


def test_a_death_of_the_store_s_host_is_named_by_all_survivors(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    variables = [{"RANK": str(rank), "WORLD_SIZE": "3", "MEETING": address} for rank in range(3)]
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, ferro\n"
        "group = ferro.init('gloo', rendezvous=os.environ['MEETING'], timeout_s=60)\n"
        "group.barrier()\n"
        "if group.rank == 0:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "try:\n"
        "    group.all_reduce(1)\n"
        "except ferro.PeerLost as error:\n"
        "    print(error.peer)\n"
    )
    ranks = [
        subprocess.Popen([sys.executable, program], env={**os.environ, **extra}, stdout=subprocess.PIPE, text=True)
        for extra in variables
    ]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["", "0\n", "0\n"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
