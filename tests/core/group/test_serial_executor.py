"""Work and SerialExecutor: operations run one at a time in the order issued, and end."""

import sys
import threading
import time

import pytest

from ferro.group.serial_executor import ExecutorClosed, SerialExecutor, on_executor_thread
from ferro.group.work import Work

S = 5.0


def run(executor, operation):
    """Run an operation in this thread, as `Dispatcher.collective` does."""
    executor.wait_for_pending()
    with executor.lock:
        return operation(executor.next_number())


@pytest.fixture
def executor():
    executor = SerialExecutor("test executor")
    yield executor
    assert executor.close(time.monotonic() + S)


def test_a_lone_operation_runs_in_the_callers_thread(executor):
    assert run(executor, lambda seq: (seq, threading.current_thread())) == (0, threading.current_thread())


def test_operations_are_numbered_and_run_in_the_order_issued(executor):
    order = []

    def operation(name):
        def run(seq):
            order.append((name, seq))
            return name

        return run

    release = threading.Event()
    first = executor.start("wait", lambda seq: release.wait(S))
    works = [executor.start("op", operation(i)) for i in range(10)]
    assert not any(work.done() for work in works)
    release.set()
    assert run(executor, operation("last")) == "last"
    assert [work.wait() for work in works] == list(range(10))
    assert order == [*((i, i + 1) for i in range(10)), ("last", 11)]
    assert (first.seq, works[3].seq, works[3].op) == (0, 4, "op")


def test_a_work_tells_its_state_and_keeps_its_error(executor):
    release = threading.Event()

    def fail(seq):
        release.wait(S)
        raise KeyError("lost")

    work = executor.start("op", fail)
    assert not work.done()
    assert repr(work) == "<Work op #0, running>"
    release.set()
    for _ in range(2):
        with pytest.raises(KeyError, match="lost"):
            work.wait()
    assert work.done()
    assert repr(work) == "<Work op #0, failed>"
    good = executor.start("op", lambda seq: "result")
    assert (good.wait(), good.wait()) == ("result", "result")
    assert repr(good) == "<Work op #1, done>"


def test_several_threads_may_wait_for_one_work(executor):
    release = threading.Event()
    work = executor.start("op", lambda seq: release.wait(S) and 7)
    results = []
    threads = [threading.Thread(target=lambda: results.append(work.wait())) for _ in range(4)]
    for thread in threads:
        thread.start()
    release.set()
    for thread in threads:
        thread.join(S)
    assert results == [7] * 4


def test_close_gives_up_at_its_deadline_and_ends_the_thread_afterwards():
    executor, release = SerialExecutor("closing"), threading.Event()
    work = executor.start("op", lambda seq: release.wait(S))
    thread = executor._thread
    assert not executor.close(time.monotonic())
    with pytest.raises(ExecutorClosed):
        executor.start("late", lambda seq: None)
    release.set()
    work.wait()
    thread.join(S)
    assert not thread.is_alive()


def test_an_executor_forgets_results_that_nobody_holds(executor):
    import weakref

    class Result:
        pass

    work: Work = executor.start("op", lambda seq: Result())
    held = weakref.ref(work.wait())
    assert held() is not None
    del work
    run(executor, lambda seq: None)
    assert held() is None


def test_only_an_executors_own_thread_is_an_executor_thread(executor):
    assert not run(executor, lambda seq: on_executor_thread())
    assert executor.start("op", lambda seq: on_executor_thread()).wait()
    assert not on_executor_thread()


def test_the_switch_interval_is_short_while_an_executors_thread_works(executor):
    before = sys.getswitchinterval()
    other = SerialExecutor("another test executor")
    release = threading.Event()
    short = executor.start("op", lambda seq: sys.getswitchinterval())
    works = [some.start("op", lambda seq: release.wait(S)) for some in (executor, other)]
    assert short.wait() < before
    release.set()
    assert all(work.wait() for work in works)
    assert executor.close(time.monotonic() + S)
    assert other.close(time.monotonic() + S)
    assert sys.getswitchinterval() == before


def test_a_switch_interval_that_the_user_sets_meanwhile_stays(executor):
    before = sys.getswitchinterval()
    try:
        executor.start("op", lambda seq: sys.setswitchinterval(0.002)).wait()
        assert executor.close(time.monotonic() + S)
        assert sys.getswitchinterval() == pytest.approx(0.002)
    finally:
        sys.setswitchinterval(before)


def test_an_operation_that_the_caller_waits_for_runs_in_its_thread_after_the_pending_ones(executor):
    hold, order = threading.Event(), []

    def note(seq):
        order.append((seq, on_executor_thread()))
        return "done"

    def first(seq):
        hold.wait(S)
        note(seq)

    works = [executor.start("first", first), executor.start("second", note)]
    threading.Timer(0.05, hold.set).start()
    assert run(executor, note) == "done"
    assert order == [(0, True), (1, True), (2, False)]
    for work in works:
        work.wait()
