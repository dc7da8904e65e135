"""Persistent broadcast, scatter, reduce and gather through shared memory, whose ranks run ahead of each other."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import numpy as np
import pytest

import ferro
from ferro_gloo.shm.native import ABSENT, NATIVE
from ferro_gloo.shm.rooted.area import depth_for
from ferro_testing import run_ranks, run_ranks_outcomes

from .short_paths import OF_FLOATS, OF_INTEGERS, REDUCED, ROOTED, dtype_of, numbers
from .test_given_back import held

pytestmark = pytest.mark.skipif(NATIVE is None, reason=ABSENT)

DEPTH = depth_for(16)
FROM_ROOT = ("broadcast", "scatter")


class Steps:
    """An operation whose ranks give 100 times their rank and the salt, twice, or twice for every rank in a scatter."""

    def __init__(self, group, op, root=0, **options):
        self.n, self.me, self.op, self.root = group.world_size, group.rank, op, root
        self.x = np.zeros(2 * self.n if op == "scatter" else 2)
        given = self.x if op != "scatter" or self.me == root else None
        options |= {"out": self.x} if op == "broadcast" else {}
        self.step = group.persistent(op, given, root, **options)
        self.writes = (self.me == root) == (op in FROM_ROOT)
        assert runs_ahead(self.step), f"{op} does not run ahead"

    def fill(self, salt):
        self.x[...] = 100 * self.me + salt

    def run(self, salt):
        self.fill(salt)
        self.check(self.step(), salt)

    def check(self, result, salt):
        if self.op in FROM_ROOT:
            wanted = [100 * self.root + salt] * 2
        elif self.me != self.root:
            wanted = None
        elif self.op == "reduce":
            wanted = [sum(100 * rank + salt for rank in range(self.n))] * 2
        else:
            wanted = np.repeat(100 * np.arange(self.n) + salt, 2).tolist()
        assert (None if result is None else result.tolist()) == wanted, (self.op, salt)


def runs_ahead(step):
    return type(step._steps).__name__ == "NativeSteps"


def caught(call, *args):
    """Describe the error that a call raises, and how long it took."""
    began = time.monotonic()
    try:
        call(*args)
    except ferro.FerroError as error:
        return [type(error).__name__, str(error), time.monotonic() - began]
    return ["nothing", "", time.monotonic() - began]


# ---- results


def compare(group):
    """Compare each step with the ordinary call, bit by bit; return the kinds of steps that do not run ahead."""
    n, me, slow = group.world_size, group.rank, []
    kinds = [("reduce", dtype, reduction) for dtype, reduction in REDUCED]
    kinds += [
        (op, dtype, None) for op in ("broadcast", "scatter", "gather") for dtype in ("int8", "bfloat16", "float64")
    ]
    for index, (op, dtype, reduction) in enumerate(kinds):
        root, size = index % n, (1, 5, 300, 2000)[index % 4]
        x = np.zeros(size * n if op == "scatter" else size, dtype_of(dtype))
        options = {} if reduction is None else {"op": reduction}
        in_place = op in ("broadcast", "reduce") and index % 3 == 0
        out = {"out": x} if in_place and (me == root or op == "broadcast") else {}
        given = x if op != "scatter" or me == root else None
        step = group.persistent(op, given, root, **options, **out)
        if not runs_ahead(step):
            slow.append([op, dtype, size])
        for count in range(2 * depth_for(x.nbytes) + 3 if index % 8 == 0 else 3):
            x[...] = numbers(x.dtype, x.size, [index, count, me])
            wanted = getattr(group, op)(given, root, **options)
            if count % 2:
                step.start()
                result = step.wait()
            else:
                result = step()
            assert (wanted is None) == (result is None), (op, dtype)
            assert wanted is None or wanted.tobytes() == result.tobytes(), (op, dtype, reduction, size, root, count)
        step.close()
    for size, wanted in ((0, False), (1000, True), (100_000, False)):
        step = group.persistent("broadcast", np.full(size, me), 0)
        assert runs_ahead(step) is wanted
        assert (step() == 0).all()
    odd = np.zeros((4, 4))[:, :2]  # one rank has an array that is not contiguous, so all take the other way
    step = group.persistent("reduce", odd if me == n - 1 else odd.copy(), 0)
    assert not runs_ahead(step)
    step()
    return slow


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_each_step_has_the_bits_of_the_ordinary_call(ranks):
    assert {reduction for _, reduction in REDUCED} == {*OF_FLOATS, *OF_INTEGERS}
    assert run_ranks(compare, ranks, backend="gloo", timeout_s=90) == [[]] * ranks


def run_ahead(group):
    """The ranks that give data make as many steps as there are slots, and start one more, before the others begin."""
    others = [rank for rank in range(group.world_size) if rank != group.rank]
    word = np.zeros(1)
    for op in ROOTED:
        ahead = Steps(group, op, root=1)
        if ahead.writes:
            for salt in range(DEPTH):
                ahead.run(salt)
            ahead.fill(DEPTH)
            ahead.step.start()
            assert not ahead.step.done()
        readers = [1] if op not in FROM_ROOT else [rank for rank in range(group.world_size) if rank != 1]
        for rank in others:
            if ahead.writes and rank in readers:
                group.send(word, rank)
            if not ahead.writes and rank not in readers:
                group.recv(word, rank)
        if not ahead.writes:
            for salt in range(DEPTH + 1):
                ahead.run(salt)
        group.barrier()  # the step that was started goes on beside it
        if ahead.writes:
            ahead.check(ahead.step.wait(), DEPTH)
        for salt in range(3 * DEPTH):
            ahead.run(salt)
    return True


def cross(group):
    """Start many steps, also beside an all_reduce, and wait for them in another order on each rank, again and again."""
    order = random.Random(group.rank)
    many = [Steps(group, ROOTED[index % 4], root=index % group.world_size) for index in range(80)]
    total = group.persistent("all_reduce", np.ones(1))
    for salt in range(12):
        late = salt % group.world_size == group.rank
        for each in many:
            each.fill(salt)
            each.step.start()
            if late and each is many[40]:
                time.sleep(0.02)
        total.start()
        assert group.all_reduce(np.ones(1))[0] == group.world_size
        for each in order.sample(many, len(many)):
            if order.random() < 0.5:
                each.step.done()
            each.check(each.step.wait(), salt)
        assert total.wait()[0] == group.world_size
        for each in many[::7]:
            each.run(salt)
    for each in many:
        each.step.close()
    return True


def make_and_close(group):
    """Make operations again and again, half of them left to the garbage collector; return the memory taken."""
    for number in range(120):
        x = np.full(8000, number)
        step = group.persistent("broadcast", x, number % 2, out=x)
        assert runs_ahead(step)
        step()
        if number % 2:
            step.close()
            step.close()
        del step
    return group._backend._host.arenas._own._reserved


def fork(group):
    """A child that is forked while a step is under way leaves it as it is."""
    rooted = Steps(group, "broadcast")
    group.barrier()
    rooted.fill(1)
    if group.rank:
        rooted.step.start()
    child = os.fork()
    if child == 0:
        left = held()
        with pytest.raises(ferro.UsageError, match="forked"):
            rooted.step.wait() if group.rank else rooted.step()
        rooted.step.close()
        os._exit(len(left))
    _, status = os.waitpid(child, 0)
    for rank in range(1, group.world_size) if group.rank == 0 else ():
        group.recv(np.zeros(1), rank)
    if group.rank:
        group.send(np.zeros(1), 0)
    rooted.check(rooted.step.wait() if group.rank else rooted.step(), 1)
    rooted.run(2)
    return os.waitstatus_to_exitcode(status)


def leave_open(group):
    rooted = Steps(group, "reduce")
    rooted.run(1)
    rooted.step.start()
    rooted.step.wait()
    group.close()
    left = held()
    with pytest.raises(ferro.GroupClosed):
        rooted.step()
    rooted.step.close()
    return left


def use(group):
    """Run all of the above, one after the other."""
    found = [run_ahead(group), cross(group), make_and_close(group) <= 16 << 20, fork(group)]
    if group.rank < 2:  # and in another group
        rooted = Steps(group.subgroup([1, 0]), "gather", root=1)
        for salt in range(2 * DEPTH):
            rooted.run(salt)
    return [*found, leave_open(group)]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_run_ahead_and_wait_in_any_order(ranks):
    assert run_ranks(use, ranks, backend="gloo", timeout_s=90) == [[True, True, True, 0, []]] * ranks


# ---- mismatches


def leave_out_a_step(group, op, odd):
    """One rank leaves out a step; all make another collective, and the next step."""
    rooted = Steps(group, op, root=1)
    for salt in range(3):
        rooted.run(salt)
    if group.rank != odd:
        rooted.fill(3)
        rooted.step()
    group.barrier()
    for _ in range(2 * DEPTH):
        rooted.fill(4)
        rooted.step()
    group.barrier()


def call_other(group, op, odd, other):
    """One rank makes another call than a step, and waits there, or goes on."""
    rooted, second = Steps(group, op, root=1), Steps(group, op, root=1)
    for salt in range(3):
        rooted.run(salt)
    if group.rank == odd:
        {"barrier": group.barrier, "step": second.step, "object": lambda: group.all_gather_object(1)}[other]()
    for _ in range(2 * DEPTH):
        rooted.step()
    group.barrier()


def leave_out_the_last(group, op, at_once):
    """One rank that reads leaves out the last step, makes other calls or none, and closes the operation."""
    rooted = Steps(group, op, root=1)
    odd = 0 if op in ("broadcast", "scatter") else 1
    for salt in range(3):
        rooted.run(salt)
    if group.rank != odd:
        rooted.step()
    if at_once and group.rank == odd:
        group.recv(np.zeros(1), 1 - odd)
    elif at_once and group.rank == 1 - odd:
        group.send(np.zeros(1), odd)
    if not at_once or group.rank != odd:
        group.barrier()
    rooted.step.close()
    group.barrier()


def read_different(group):
    """Two ranks read different operations, each the data of the other; the third has given its data to both."""
    first, second = Steps(group, "reduce", root=0), Steps(group, "gather", root=1)
    for rooted in (first, second):
        rooted.run(0)
    if group.rank != 1:
        first.step()
    if group.rank != 0:
        second.step()
    group.barrier()


def differ(group):
    """Make each mistake in a group of its own; describe what this rank finds."""
    found = []
    for index, op in enumerate(ROOTED):
        for odd in (0, 1):
            part = group.subgroup(range(group.world_size))
            found.append([f"{op}, rank {odd} leaves out a step", *caught(leave_out_a_step, part, op, odd)])
            part = group.subgroup(range(group.world_size))
            other = ("barrier", "step", "object")[(index + odd) % 3]
            found.append([f"{op}, rank {odd} calls {other}", *caught(call_other, part, op, odd, other)])
            group.barrier()
        for at_once in (False, True):
            part = group.subgroup(range(group.world_size))
            found.append([f"{op}, a reader leaves out the last step", *caught(leave_out_the_last, part, op, at_once)])
            group.barrier()
    part = group.subgroup(range(group.world_size))
    found.append(["two ranks read different operations", *caught(read_different, part)])
    group.barrier()
    return found


def test_a_rank_that_leaves_out_a_step_or_makes_another_call_is_found_on_all_ranks():
    results = run_ranks(differ, 3, backend="gloo", timeout_s=100)
    for told in zip(*results, strict=True):
        what = told[0][0]
        assert [kind for _, kind, *_ in told] == ["CollectiveMismatch"] * 3, (what, told)
        assert len({text for _, _, text, _ in told}) == 1, told
        assert max(seconds for *_, seconds in told) < 20, (what, told)


# ---- failures


def fail(group, how, op):
    """Run steps until one fails: one rank, for which the others wait, ends the group in some way, or stays away."""
    rooted = Steps(group, op, root=1, timeout_s=1.0 if how == "late" else 30.0)
    missed = 1 if op in FROM_ROOT else 0
    for salt in range(3):
        rooted.run(salt)
    try:
        group.barrier()
        if group.rank == missed and how == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        if group.rank == missed and how == "abort":
            group.abort()
        if group.rank == 1 - missed and how == "interrupt":
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        if group.rank == missed:
            group._dispatcher._info.store.get("failure/verdict", deadline=float("inf"))
        while True:
            rooted.step()
    except KeyboardInterrupt:
        return "KeyboardInterrupt"
    except ferro.FerroError as error:
        named = how != "late" or error.missing == (missed,)
        return type(error).__name__ if named else str(error)


@pytest.mark.parametrize("how", ["death", "abort", "late", "interrupt"])
@pytest.mark.parametrize("op", ["scatter", "reduce"])
@pytest.mark.usefixtures("default_sigint")
def test_every_rank_learns_of_a_failure(how, op):
    outcomes = run_ranks_outcomes(fail, 3, backend="gloo", args=[how, op], timeout_s=60)
    missed, waiting = (1, 0) if op in FROM_ROOT else (0, 1)
    kind = {"death": "PeerLost", "late": "CollectiveTimeout"}.get(how, "GroupClosed")
    expected = [kind] * 3
    expected[missed] = "SIGKILL" if how == "death" else kind
    expected[waiting] = "KeyboardInterrupt" if how == "interrupt" else kind
    found = [outcome.result if outcome.ok else outcome.signal for outcome in outcomes]
    assert found == expected, "\n".join(outcome.describe() for outcome in outcomes)
