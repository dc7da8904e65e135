"""Work and SerialExecutor: operations run one at a time in the order issued, and end."""

import sys
import threading
import time

import pytest

from ferro.group.serial_executor import ExecutorClosed, SerialExecutor, on_executor_thread
from ferro.group.work import Work

S = 5.0


@pytest.fixture
def lane():
    lane = SerialExecutor("test lane")
    yield lane
    assert lane.close(time.monotonic() + S)


def test_a_lone_operation_runs_in_the_callers_thread(lane):
    assert lane.run("op", lambda seq: (seq, threading.current_thread())) == (0, threading.current_thread())


def test_operations_are_numbered_and_run_in_the_order_issued(lane):
    order = []

    def operation(name):
        def run(seq):
            order.append((name, seq))
            return name

        return run

    gate = threading.Event()
    first = lane.start("wait", lambda seq: gate.wait(S))
    works = [lane.start("op", operation(i)) for i in range(10)]
    assert not any(work.done() for work in works)
    gate.set()
    assert lane.run("op", operation("last")) == "last"
    assert [work.wait() for work in works] == list(range(10))
    assert order == [*((i, i + 1) for i in range(10)), ("last", 11)]
    assert (first.seq, works[3].seq, works[3].op) == (0, 4, "op")


def test_a_work_tells_its_state_and_keeps_its_error(lane):
    gate = threading.Event()

    def fail(seq):
        gate.wait(S)
        raise KeyError("lost")

    work = lane.start("op", fail)
    assert not work.done()
    assert repr(work) == "<Work op #0, running>"
    gate.set()
    for _ in range(2):
        with pytest.raises(KeyError, match="lost"):
            work.wait()
    assert work.done()
    assert repr(work) == "<Work op #0, failed>"
    good = lane.start("op", lambda seq: "result")
    assert (good.wait(), good.wait()) == ("result", "result")
    assert repr(good) == "<Work op #1, done>"


def test_several_threads_may_wait_for_one_work(lane):
    gate = threading.Event()
    work = lane.start("op", lambda seq: gate.wait(S) and 7)
    results = []
    threads = [threading.Thread(target=lambda: results.append(work.wait())) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(S)
    assert results == [7] * 4


def test_close_gives_up_at_its_deadline_and_ends_the_thread_afterwards():
    lane, gate = SerialExecutor("closing"), threading.Event()
    work = lane.start("op", lambda seq: gate.wait(S))
    thread = lane._thread
    assert not lane.close(time.monotonic())
    with pytest.raises(ExecutorClosed):
        lane.start("late", lambda seq: None)
    gate.set()
    work.wait()
    thread.join(S)
    assert not thread.is_alive()


def test_a_lane_forgets_results_that_nobody_holds(lane):
    import weakref

    class Result:
        pass

    work: Work = lane.start("op", lambda seq: Result())
    held = weakref.ref(work.wait())
    assert held() is not None
    del work
    lane.run("op", lambda seq: None)
    assert held() is None


def test_only_a_lanes_thread_is_one(lane):
    assert not lane.run("op", lambda seq: on_executor_thread())
    assert lane.start("op", lambda seq: on_executor_thread()).wait()
    assert not on_executor_thread()


def test_threads_take_short_turns_while_a_lanes_thread_works(lane):
    before = sys.getswitchinterval()
    other = SerialExecutor("another test lane")
    gate = threading.Event()
    short = lane.start("op", lambda seq: sys.getswitchinterval())
    works = [some.start("op", lambda seq: gate.wait(S)) for some in (lane, other)]
    assert short.wait() < before
    gate.set()
    assert all(work.wait() for work in works)
    assert lane.close(time.monotonic() + S)
    assert other.close(time.monotonic() + S)
    assert sys.getswitchinterval() == before


def test_a_turn_that_the_user_sets_meanwhile_stays(lane):
    before = sys.getswitchinterval()
    try:
        lane.start("op", lambda seq: sys.setswitchinterval(0.002)).wait()
        assert lane.close(time.monotonic() + S)
        assert sys.getswitchinterval() == pytest.approx(0.002)
    finally:
        sys.setswitchinterval(before)


def test_what_the_caller_waits_for_runs_in_its_thread_after_what_is_pending(lane):
    hold, order = threading.Event(), []

    def note(seq):
        order.append((seq, on_executor_thread()))
        return "done"

    def first(seq):
        hold.wait(S)
        note(seq)

    works = [lane.start("first", first), lane.start("second", note)]
    threading.Timer(0.05, hold.set).start()
    assert lane.run("third", note) == "done"
    assert order == [(0, True), (1, True), (2, False)]
    for work in works:
        work.wait()
