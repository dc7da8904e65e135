"""Persistent exchanges through shared memory: right for every pattern, never stuck, and failing as other waits do."""

from __future__ import annotations

import os
import random
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest

import ferro
from ferro_gloo.backend import GlooBackend
from ferro_gloo.shm.exchange.native_steps import NATIVE_STEPS
from ferro_testing import run_ranks, run_ranks_outcomes

from .test_given_back import held

SIZES = (0, 1, 2, 7, 300, 5_000, 40_000, 200_000)  # in elements: through 4 slots, 2, 8, and more blocks than slots
DTYPES = (np.float64, np.float32, np.int16, np.bool_)
LARGE = 300_000  # float64: far more blocks than a channel has slots


@pytest.fixture(params=[True, False], ids=["native", "pure Python"])
def options(request):
    return {"backend_options": {"native_helper": request.param}}


def native_steps(options):
    """Say whether ranks with these options have native steps."""
    return NATIVE_STEPS is not None and options["backend_options"]["native_helper"]


def steps_of(operation):
    """The steps in shared memory of a persistent exchange."""
    return operation._steps._native._steps


def messages_of(group, seed):
    """Choose messages between random ranks, the same on all ranks: (source, target, array of elements) each."""
    chosen = random.Random(seed)
    count = chosen.choice((0, 1, 2 * group.world_size, 4 * group.world_size))
    return [
        (
            chosen.randrange(group.world_size),
            chosen.randrange(group.world_size),
            chosen.choice(SIZES),
            chosen.choice(DTYPES),
            chosen.random() < 0.3,
        )
        for _ in range(count)
    ]


def fill(array, message, step):
    number = message * 100 + step
    array[...] = (np.arange(array.size) + number) % 100 > 40 if array.dtype == bool else number


def run_pattern(group, seed):
    """Run steps of one random pattern; return what a step received wrongly."""
    sends, recvs, sent, received = [], [], [], []
    for number, (source, target, size, dtype, shared) in enumerate(messages_of(group, seed)):
        if source == group.rank:
            out = group.empty(size, dtype) if shared else np.empty(size, dtype)
            sends.append((target, out))
            sent.append((number, out))
        if target == group.rank:
            buffer = np.empty(size, dtype)
            recvs.append((source, buffer))
            received.append((number, buffer))
    wrong = []
    with group.persistent("exchange", sends, recvs) as step:
        for count in range(7):
            for number, out in sent:
                fill(out, number, count)
            if (count + group.rank) % 3:
                step()
            else:
                step.start()
                if count == 3:
                    group.barrier()
                step.wait()
            if count == 3 and (count + group.rank) % 3:
                group.barrier()
            for number, buffer in received:
                expected = np.empty_like(buffer)
                fill(expected, number, count)
                if not (buffer == expected).all():
                    wrong.append([seed, number, count])
    return wrong


def run_patterns(group):
    return [wrong for seed in range(12) for wrong in run_pattern(group, seed)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_any_pattern(options, ranks):
    results = run_ranks(run_patterns, ranks, backend="gloo", timeout_s=90, init_options=options)
    assert results == [[]] * ranks


def exchange_in_a_ring(group):
    """Two messages to each of two neighbours, which with two ranks are one; return the kind of steps."""
    n, me = group.world_size, group.rank
    right, left = (me + 1) % n, (me - 1) % n
    outs, ins = np.empty((4, 128)), np.empty((4, 128))
    sends = list(zip([right, left, right, left], outs, strict=True))
    recvs = list(zip([left, right, left, right], ins, strict=True))
    with group.persistent("exchange", sends, recvs) as step:
        for count in range(500):
            outs[...] = 1000 * me + count
            if group.rank == 0 and count == 250:
                threading.Event().wait(0.3)  # the others may run a step ahead, and then sleep
            step()
            assert (ins[0::2] == 1000 * left + count).all()
            assert (ins[1::2] == 1000 * right + count).all()
        return type(steps_of(step)).__name__


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_late_rank_overwrites_nothing(options, ranks):
    results = run_ranks(exchange_in_a_ring, ranks, backend="gloo", timeout_s=60, init_options=options)
    assert results == ["Steps" if native_steps(options) else "PlainSteps"] * ranks


def one_way(group):
    """Rank 0 only sends, and runs ahead as far as there is room."""
    x = np.empty(10)
    sends, recvs = ([(1, x)], []) if group.rank == 0 else ([], [(0, x)])
    got = []
    with group.persistent("exchange", sends, recvs) as step:
        for count in range(50):
            if group.rank == 0:
                x[...] = count
                step.start()  # with the slots full it goes on beside the program
                step.wait()
            else:
                step()
                got.append(float(x[-1]))
    return got


def test_a_sender_may_run_ahead(options):
    results = run_ranks(one_way, 2, backend="gloo", timeout_s=60, init_options=options)
    assert results == [[], list(range(50))]


def cross_waits(group):
    """Start two long exchanges, and wait for them in different orders, rank 0 after another collective."""
    other = 1 - group.rank
    totals = []
    for shared in (False, True):
        outs = [group.empty(LARGE, np.float64) if shared else np.empty(LARGE) for _ in range(2)]
        ins = [np.empty(LARGE) for _ in range(2)]
        pairs = zip(outs, ins, strict=True)
        steps = [group.persistent("exchange", [(other, out)], [(other, got)]) for out, got in pairs]
        for count in range(3):
            for number, out in enumerate(outs):
                out[...] = 10 * group.rank + number + count
            for step in steps:
                step.start()
            if group.rank == 0:
                group.barrier()
            for step in steps if group.rank == 0 else reversed(steps):
                step.wait()
            if group.rank == 1:
                group.barrier()
            totals.append([float(got[0] + got[-1]) for got in ins])
        for step in steps:
            step.close()
    return totals


def test_long_messages_move_while_a_rank_does_something_else(options):
    results = run_ranks(cross_waits, 2, backend="gloo", timeout_s=60, init_options=options)
    for rank, totals in enumerate(results):
        theirs = 10 * (1 - rank)
        assert totals == [[2.0 * (theirs + number + count) for number in range(2)] for count in range(3)] * 2


def many_at_once(group):
    n, me = group.world_size, group.rank
    right, left = (me + 1) % n, (me - 1) % n
    arrays = [(np.full(3, me * 1000 + number), np.empty(3, np.int64)) for number in range(200)]
    steps = [group.persistent("exchange", [(right, out)], [(left, got)]) for out, got in arrays]
    for step in steps:
        step.start()
    order = list(range(200))
    random.Random(me).shuffle(order)
    for number in order:
        steps[number].wait()
    for number in order:
        steps[number].close()
    return [bool((got == left * 1000 + number).all()) for number, (_, got) in enumerate(arrays)]


def test_hundreds_at_once(options):
    results = run_ranks(many_at_once, 3, backend="gloo", timeout_s=90, init_options=options)
    assert results == [[True] * 200] * 3


def make_and_close(group):
    """Make exchanges of 3 MiB again and again, half of them left to the garbage collector; return the memory taken."""
    other = 1 - group.rank
    for number in range(60):
        x, got = np.full(100_000, number), np.empty(100_000, np.int64)
        step = group.persistent("exchange", [(other, x)], [(other, got)])
        step()
        assert (got == number).all()
        if number % 2:
            step.close()
            step.close()
        del step
    return group._backend._host.arenas._own._reserved


def test_closed_exchanges_give_their_memory_back(options):
    reserved = run_ranks(make_and_close, 2, backend="gloo", timeout_s=60, init_options=options)
    assert max(reserved) <= 16 << 20


def leave_open(group):
    other = 1 - group.rank
    x, got = np.zeros(LARGE), np.empty(LARGE)
    step = group.persistent("exchange", [(other, x)], [(other, got)])
    step()
    step.start()
    step.wait()
    group.close()
    left = held()
    with pytest.raises(ferro.GroupClosed):
        step()
    step.close()
    return left


def test_a_closed_world_keeps_no_memory_of_open_exchanges(options):
    assert run_ranks(leave_open, 2, backend="gloo", timeout_s=60, init_options=options) == [[], []]


def fork_in_the_middle(group):
    """A child that is forked while a thread carries a step on ends at once, and leaves the exchange as it is."""
    other = 1 - group.rank
    x, got = np.full(LARGE, group.rank), np.empty(LARGE, np.int64)
    step = group.persistent("exchange", [(other, x)], [(other, got)])
    step.start()
    child = os.fork()
    if child == 0:
        left = held()
        with pytest.raises(ferro.UsageError, match="forked"):
            step.wait()
        step.close()
        os._exit(len(left))
    _, status = os.waitpid(child, 0)
    step.wait()
    step()
    return [os.waitstatus_to_exitcode(status), int(got[0]), int(got[-1])]


def test_a_forked_child_leaves_the_exchange_alone(options):
    results = run_ranks(fork_in_the_middle, 2, backend="gloo", timeout_s=60, init_options=options)
    assert [got for _, *got in results] == [[1, 1], [0, 0]]
    if native_steps(options):  # in pure Python a frame of the ended thread may hold a view of the memory
        assert [left for left, *_ in results] == [0, 0]


def use_wrongly(group):
    other = 1 - group.rank
    x, got = np.zeros(4), np.empty(4)
    step = group.persistent("exchange", [(other, x)], [(other, got)])
    told = []
    twice, after_close = lambda: (step.start(), step.start()), lambda: (step.wait(), step.close(), step())
    for call in (step.wait, step.done, twice, after_close):
        with pytest.raises(ferro.UsageError) as caught:
            call()
        told.append(str(caught.value).partition(":")[2].strip())
    with pytest.raises(ferro.CollectiveMismatch, match="sends 4 x float64 to rank 1, which receives 5 x float64"):
        group.persistent("exchange", [(other, x)], [(other, np.empty(4 + group.rank))])
    return told


def test_wrong_use_is_told():
    told = ["call start() first", "call start() first", "call wait() first", "make a new one"]
    assert run_ranks(use_wrongly, 2, backend="gloo", timeout_s=60) == [told, told]


def end(group, how, nbytes, timeout_s):
    """Run steps with both neighbours until one fails; return the error, and rank 0's way to end the group."""
    n, me = group.world_size, group.rank
    peers = [(me + 1) % n, (me - 1) % n]
    arrays = [np.zeros(nbytes, np.uint8) for _ in range(4)]
    sends = list(zip(peers, arrays[:2], strict=True))
    recvs = list(zip(reversed(peers), arrays[2:], strict=True))
    step = group.persistent("exchange", sends, recvs, timeout_s=timeout_s)
    for _ in range(3):
        step()
    if me == 0 and how == "death":
        os.kill(os.getpid(), signal.SIGKILL)
    if me == 0 and how == "abort":
        group.abort()
    if me == 1 and how == "interrupt":
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    if me == 0 and how in ("interrupt", "late"):
        group._dispatcher._info.store.get("failure/verdict", deadline=float("inf"))
    try:
        while True:
            step()
    except KeyboardInterrupt:
        return "KeyboardInterrupt"
    except ferro.FerroError as error:
        step.close()
        return type(error).__name__


@pytest.mark.parametrize("nbytes", [100, 3_000_000])
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("death", ["Killed", "PeerLost", "PeerLost"]),
        ("abort", ["GroupClosed", "GroupClosed", "GroupClosed"]),
        ("late", ["CollectiveTimeout"] * 3),
        ("interrupt", ["GroupClosed", "KeyboardInterrupt", "GroupClosed"]),
    ],
)
@pytest.mark.usefixtures("default_sigint")
def test_every_rank_learns_of_a_failure(options, how, expected, nbytes):
    limit_s = 1.0 if how == "late" else 30.0
    outcomes = run_ranks_outcomes(
        end, 3, backend="gloo", args=[how, nbytes, limit_s], timeout_s=60, init_options=options
    )
    found = [outcome.result if outcome.ok else outcome.error_type for outcome in outcomes]
    assert found == expected, "\n".join(outcome.describe() for outcome in outcomes)


def exchange_in_parts(group):
    """Exchange in two groups that overlap in rank 1, and in the world."""
    results = []
    for ranks in ([0, 1], [1, 2]):
        if group.rank in ranks:
            part = group.subgroup(ranks)
            x, got = np.full(4, group.rank), np.empty(4, np.int64)
            other = 1 - part.rank
            with part.persistent("exchange", [(other, x)], [(other, got)]) as step:
                step()
                results.append(int(got[0]))
            part.close()
    return results


def test_groups_have_exchanges_of_their_own(options):
    results = run_ranks(exchange_in_parts, 3, backend="gloo", timeout_s=60, init_options=options)
    assert results == [[1], [0, 2], [1]]


def test_between_hosts_an_exchange_repeats_the_ordinary_one(start_ranks):
    def connect(config):
        return GlooBackend.connect(replace(config, host_id=f"host {config.rank // 2}"))

    def exchange(group):
        n, me = group.world_size, group.rank
        x, got = np.full(4, me), np.empty(4, np.int64)
        with group.persistent("exchange", [((me + 1) % n, x)], [((me - 1) % n, got)]) as step:
            step()
            step()
        return int(got[0])

    ranks = start_ranks(4, connect=connect)
    ranks.start(exchange)
    assert ranks.join() == {0: 3, 1: 0, 2: 1, 3: 2}, ranks.errors
