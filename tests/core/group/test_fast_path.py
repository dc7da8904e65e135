"""The fast path of a backend: when a group takes it, what it is given, and how its failures end the group."""

import contextlib
import os
import threading
import time

import numpy as np
import pytest

import ferro
from ferro.collectives.fast_path import BUSY, NUMBER
from ferro.simulated import simulate
from ferro.simulated.backend import SimulatedBackend

S = 5.0


class CountingPath:
    """A fast path of a world of one rank: it copies the input to the result."""

    def __init__(self, collective, turn):
        self.collective, self.turn = collective, turn
        self.calls = []
        self.declines = False
        self.is_late = None

    def __call__(self, source, target):
        turn = self.turn
        if self.declines or turn.state[BUSY] or turn.lock.locked() or turn.pending:
            return False
        turn.state[NUMBER] += 1
        self.calls.append((source, target))
        if self.is_late is not None:
            with turn.lock:
                turn.late(self.collective.call, self.is_late)
        if target is not None:
            target[...] = source
        return True

    def bind(self, source, target):
        return BoundPath(self, source, target)


class BoundPath:
    def __init__(self, path, source, target):
        self.path, self.source, self.target = path, source, target
        self.under_way, self.closed, self.ready = False, False, True

    def __call__(self):
        return self.path(self.source, self.target)

    def start(self):
        assert self.path.turn.lock.locked(), "the caller holds the lock"
        self.under_way = True
        return not self.path.declines

    def test(self):
        return self.ready

    def finish(self):
        assert self.under_way
        self.under_way = False
        if self.path.is_late is not None:
            self.path.turn.late(self.path.collective.call, self.path.is_late)
        self.target[...] = self.source

    def close(self):
        self.closed = True


@pytest.fixture
def paths(monkeypatch):
    made = []

    def fast_path(backend, collective, turn):
        made.append(CountingPath(collective, turn))
        return made[-1]

    monkeypatch.setattr(SimulatedBackend, "fast_path", fast_path)
    return made


def alone(work, **options):
    """Run a function in a world of one rank; return its result."""
    return simulate(work, 1, timeout_s=S, run_timeout_s=20, **options)[0]


def test_a_kind_of_call_takes_the_fast_path_when_it_comes_again(paths):
    def work(group):
        x = np.ones(3)
        for _ in range(4):
            group.all_reduce(x)
        kinds = [(path.collective.op, path.collective.count, len(path.calls)) for path in paths]
        other = np.ones((3, 1))
        for _ in range(2):
            group.all_reduce(other, out=other)
        return kinds, len(paths), paths[1].calls

    kinds, count, calls = alone(work)
    assert kinds == [("all_reduce", 3, 3)]
    assert count == 2
    assert calls[0][0] is calls[0][1]


def test_calls_differ_by_dtype_shape_reduction_and_root(paths):
    def work(group):
        x = np.ones(3, np.float32)
        for _ in range(3):
            group.all_reduce(x)
            group.all_reduce(x, "max")
            group.all_reduce(x.astype(np.float64))
            group.all_reduce(x.reshape(3, 1))
            group.broadcast(x, 0)
            group.reduce(x, 0)
            group.barrier()

    alone(work)
    assert [len(path.calls) for path in paths] == [2] * 7
    assert len({path.collective.call.label() for path in paths}) == 7


@pytest.mark.parametrize(
    "call",
    [
        lambda g: g.all_reduce([1.0, 2.0]),
        lambda g: g.all_reduce(np.float32(1)),
        lambda g: g.all_reduce(np.ones(3), lambda a, b, out: np.add(a, b, out)),
        lambda g: g.all_reduce(np.ones(3), timeout_s=S),
        lambda g: g.all_reduce(np.ones(3), async_op=True).wait(),
        lambda g: g.all_gather(np.ones(3), sizes=[3]),
        lambda g: g.broadcast(np.ones(3, "M8[s]")),
        lambda g: g.all_reduce(np.ma.array([1.0]).filled(0)[:1].view(type("Sub", (np.ndarray,), {}))),
    ],
    ids=["list", "scalar", "function", "deadline", "async", "sizes", "dates", "sub-class"],
)
def test_other_calls_never_take_it(paths, call):
    def work(group):
        for _ in range(4):
            with contextlib.suppress(ferro.UsageError):
                call(group)

    alone(work)
    assert not any(path.calls for path in paths)


@pytest.mark.parametrize(
    "out",
    [np.empty(4), np.empty(3, np.float32), [0.0, 0.0, 0.0], np.empty((3, 1))],
    ids=["size", "dtype", "list", "shape"],
)
def test_a_wrong_out_is_refused_by_the_ordinary_path(paths, out):
    def work(group):
        x = np.ones(3)
        for _ in range(3):
            group.all_reduce(x)
        with pytest.raises(ferro.UsageError, match="out"):
            group.all_reduce(x, out=out)
        group.all_reduce(x)

    alone(work)
    assert len(paths[0].calls) == 3


def test_it_is_left_alone_where_observers_are_told_of_each_call(paths):
    metrics = ferro.Metrics()

    def work(group):
        for _ in range(3):
            group.barrier()
            group.all_reduce(np.ones(2))

    alone(work, observers=[metrics])
    assert not paths
    assert metrics.totals()["world", "all_reduce"].count == 3


def test_a_call_that_it_declines_runs_in_the_ordinary_way(paths):
    def work(group):
        x = np.ones(3)
        for _ in range(3):
            group.all_reduce(x)
        paths[0].declines = True
        return float(group.all_reduce(x)[0])

    assert alone(work) == 1.0


def test_its_calls_are_numbered_with_the_others(paths):
    def work(group):
        for _ in range(4):
            group.barrier()  # three of them on the fast path
        return group.all_reduce(np.ones(1), async_op=True).seq

    assert alone(work) == 4


def test_a_late_rank_ends_the_group_with_the_cause(paths):
    def work(group):
        for _ in range(3):
            group.all_reduce(np.ones(1))

        def wait(*, deadline):
            raise ferro.CollectiveMismatch("rank 0 called this; rank 1 called that", peer=0)

        paths[0].is_late = wait
        with pytest.raises(ferro.CollectiveMismatch, match="this"):
            group.all_reduce(np.ones(1))
        assert group.state == "dead"
        assert not paths[0].turn.lock.locked()
        with pytest.raises(ferro.GroupClosed):
            group.all_reduce(np.ones(1))
        return paths[0].turn.state[BUSY]

    assert alone(work) == 1


def test_the_wait_has_the_deadline_of_the_group_or_of_the_persistent_operation(paths):
    left = []

    def wait(*, deadline):
        left.append(deadline - time.monotonic())

    def work(group):
        x = np.ones(1)
        for _ in range(3):
            group.all_reduce(x)
        step = group.persistent("all_reduce", x, timeout_s=50.0)
        for path in paths:
            path.is_late = wait
        group.all_reduce(x)
        step()

    alone(work)
    assert S - 1 < left[0] <= S
    assert 49 < left[1] <= 50


def test_an_interrupt_in_the_wait_ends_the_group_and_reaches_the_program(paths):
    def wait(*, deadline):
        raise KeyboardInterrupt

    def work(group):
        for _ in range(3):
            group.all_reduce(np.ones(1))
        paths[0].is_late = wait
        with pytest.raises(KeyboardInterrupt):
            group.all_reduce(np.ones(1))
        return group.state

    assert alone(work) == "dead"


def test_a_started_step_is_finished_by_the_next_operation(paths):
    def work(group):
        x, y = np.ones(2), np.zeros(2)
        step = group.persistent("all_reduce", x, out=y)
        step.start()
        assert paths[0].turn.lock.locked()
        before = y.copy()
        total = group.all_reduce(np.ones(1))  # in this thread: it finishes the step first
        after = y.copy()
        assert not paths[0].turn.lock.locked()
        assert step.done()
        assert step.wait() is y
        return float(total[0]), before.tolist(), after.tolist()

    assert alone(work) == (1.0, [0.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_started_step_does_not_keep_other_threads_waiting(paths, asynchronous):
    def work(group):
        step = group.persistent("all_reduce", np.ones(2))
        totals = []

        def other():
            total = group.all_reduce(np.ones(1), async_op=asynchronous)
            totals.append(float((total.wait() if asynchronous else total)[0]))

        for _ in range(50):
            thread = threading.Thread(target=other)
            thread.start()
            step.start()
            thread.join(S)
            assert not thread.is_alive()
            step.wait()
        return totals

    assert alone(work) == [1.0] * 50


def test_two_started_steps_end_in_any_order(paths):
    def work(group):
        first, second = group.persistent("all_reduce", np.ones(1)), group.persistent("all_reduce", np.ones(2))
        for _ in range(3):
            first.start()
            second.start()  # behind it, in the group's thread
            assert second.wait().tolist() == [1.0, 1.0]
            assert first.wait().tolist() == [1.0]
        first.close()
        return paths[0].turn.lock.locked()

    assert alone(work) is False


def test_the_failure_of_a_step_that_another_operation_finishes_is_its_own(paths):
    def wait(*, deadline):
        raise ferro.PeerLost("rank 0 is gone", peer=0)

    def work(group):
        step = group.persistent("all_reduce", np.ones(1))
        step.start()
        paths[0].is_late = wait
        with pytest.raises(ferro.GroupClosed, match="rank 0 is gone"):
            group.barrier()
        with pytest.raises(ferro.PeerLost):
            step.wait()
        step.close()

    alone(work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_does_not_take_it(paths):
    def work(group):
        for _ in range(3):
            group.barrier()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                group.barrier()
            except ferro.UsageError:
                code = 7
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert alone(work) == 7


def test_a_closed_group_does_not_take_it(paths):
    def work(group):
        part = group.subgroup([0])
        for _ in range(3):
            part.barrier()
        part.close()
        with pytest.raises(ferro.GroupClosed):
            part.barrier()

    alone(work)


def test_memory_that_is_not_there_for_a_result_ends_nothing(paths, monkeypatch):
    def work(group):
        for _ in range(3):
            group.all_reduce(np.ones(1))

        def empty(shape, dtype):
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr("ferro.group.fast_calls._empty", empty)
            with pytest.raises(MemoryError):
                group.all_reduce(np.ones(1))
        return float(group.all_reduce(np.ones(1))[0])

    assert alone(work) == 1.0
