"""Transfers: their places in both directions, many outstanding, the group's thread, transfers to itself."""

import gc
import threading
import time

import numpy as np
import pytest

import ferro
from ferro.simulated import simulate
from ferro.simulated.backend import SimulatedBackend

S = 5.0


def numbered_threads(name):
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def test_a_sendrecv_behind_an_outstanding_receive_sends_at_once():
    def work(group):
        a, b, c = np.zeros(1), np.zeros(1), np.zeros(1)
        if group.rank == 0:
            first = group.recv(a, 1, async_op=True)
            group.sendrecv(np.array([3.0]), b, 1)
            first.wait()
            return a[0], b[0]
        group.recv(c, 0)
        group.send(np.array([1.0]), 0)
        group.send(np.array([2.0]), 0)
        return c[0]

    assert simulate(work, 2, timeout_s=S, run_timeout_s=20) == [(1.0, 2.0), 3.0]


def test_a_transfer_issued_while_the_first_one_is_being_posted_is_not_forgotten(monkeypatch):
    posted_transfers = SimulatedBackend.posted_transfers
    being_posted, issued = threading.Event(), threading.Event()

    def late(backend):
        if backend.rank == 0:
            being_posted.set()
            issued.wait(S)
        return posted_transfers(backend)

    monkeypatch.setattr(SimulatedBackend, "posted_transfers", late)

    def work(group):
        if group.rank == 1:
            return group.send(group.recv(np.zeros(1), 0) + 1, 0)
        received = group.recv(np.zeros(1), 1, async_op=True)
        being_posted.wait(S)
        sent = group.send(np.array([3.0]), 1, async_op=True)
        issued.set()
        sent.wait()
        return float(received.wait()[0])

    assert simulate(work, 2, timeout_s=S, run_timeout_s=20) == [4.0, None]


def test_the_halves_of_a_sendrecv_do_not_wait_for_each_other():
    """Rank 1 answers only when it has the whole message, which may not wait for the answer's label."""

    def work(group):
        a = np.zeros(1)
        if group.rank == 0:
            return float(group.sendrecv(np.array([3.0]), a, 1)[0])
        group.recv(a, 0)
        group.send(a + 1, 0)
        return None

    assert simulate(work, 2, timeout_s=S, run_timeout_s=20) == [4.0, None]


def test_a_thousand_outstanding_receives_take_one_thread():
    def work(group):
        if group.rank == 0:
            group.barrier()
            for tag in range(1000):
                group.send(np.array(tag), 1, tag)
            return None
        works = [group.recv(np.array(0), 0, tag, async_op=True) for tag in range(1000)]
        group.barrier()
        threads = len(numbered_threads("ferro-world"))
        return threads, [int(work.wait()) for work in works] == list(range(1000))

    assert simulate(work, 2, timeout_s=30, run_timeout_s=60)[1] == (1, True)


@pytest.mark.parametrize("call", [lambda g: g.all_reduce(1, async_op=True), lambda g: receive_later(g)])
def test_a_thread_that_cannot_be_started_leaves_the_group_as_it_was(monkeypatch, call):
    start, refused = threading.Thread.start, threading.Barrier(2)

    def refuse(thread):
        if thread.name.startswith("ferro-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)

    def work(group):
        with pytest.raises(ferro.ThreadLimitError, match=r"ulimit -u.*the group is good"):
            call(group)
        refused.wait(S)
        threading.Thread.start = start
        return int(call(group).wait()), int(group.all_reduce(1))

    assert simulate(work, 2, timeout_s=S, run_timeout_s=20) == [(2, 2)] * 2


def receive_later(group):
    work = group.sendrecv(np.array(2), np.array(0), 1 - group.rank, async_op=True)
    assert work is not None
    return work


def test_the_threads_of_a_dropped_group_end_at_once():
    def work(group):
        inner = group.subgroup(range(2), name="dropped")
        inner.all_reduce(1, async_op=True).wait()
        receive_later(inner).wait()
        threads = numbered_threads("ferro-dropped")
        group.barrier()
        del inner
        group.barrier()
        for thread in threads:
            thread.join(2.0)  # an idle thread would live for 5 s
        return len(threads) > 0, any(thread.is_alive() for thread in threads)

    assert simulate(work, 2, timeout_s=S, run_timeout_s=20) == [(True, False)] * 2


def test_a_rank_that_is_its_own_neighbour_copies():
    def work(group):
        x, out = np.arange(3.0), np.empty(3)
        assert group.sendrecv(x, out, 0) is out
        assert group.sendrecv(x + 1, x, 0, async_op=True).wait() is x
        return out.tolist(), x.tolist()

    assert simulate(work, 1) == [([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])]


def test_two_ranks_that_both_receive_first_are_told_of_the_deadlock():
    def work(group):
        with pytest.raises(ferro.CollectiveTimeout) as caught:
            group.recv(np.empty(2), 1 - group.rank, tag=3)
        return str(caught.value)

    for text in simulate(work, 2, timeout_s=0.3, run_timeout_s=20):
        assert "deadlock: both ranks are receiving" in text
        assert "Use sendrecv" in text
        assert "16 bytes from rank 0, tag 3" in text
        assert "16 bytes from rank 1, tag 3" in text


def test_a_timeout_error_of_the_programs_own_is_not_taken_for_a_missed_deadline():
    def fail(a, b, out):
        raise TimeoutError("of the program")

    def add(a, b, out):
        np.add(a, b, out=out)

    def work(group):
        with pytest.raises((TimeoutError, ferro.GroupClosed)) as caught:
            [group.all_reduce(np.ones(3), fail if group.rank == 0 else add) for _ in range(2)]
        return type(caught.value), str(caught.value)

    started = time.monotonic()
    own, other = simulate(work, 2, timeout_s=30, run_timeout_s=60)
    assert own == (TimeoutError, "of the program")
    assert other[0] is ferro.GroupClosed
    assert "failed on rank 0 of 2: TimeoutError: of the program" in other[1]
    assert time.monotonic() - started < 30


def test_a_waiting_transfer_that_is_interrupted_is_as_if_it_had_not_been_issued():
    """It waited for its turn, so nothing had moved: the group goes on."""
    import ctypes

    class Late(Exception):
        pass

    def work(group):
        if group.rank == 1:
            interrupted.wait(S)
            group.send(np.array(1.0), 0)
            group.send(np.array(2.0), 0)
            return None
        first = group.recv(np.array(0.0), 1, async_op=True)
        channel = group._dispatcher._transfers._channels[("recv", 1, 0)]
        rank_0 = threading.get_ident()

        def interrupt():
            while len(channel) < 2:
                time.sleep(0.01)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(rank_0), ctypes.py_object(Late))
            interrupted.set()

        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(Late):
            group.recv(np.array(0.0), 1)
        assert float(first.wait()) == 1.0
        return float(group.recv(np.array(0.0), 1))

    interrupted = threading.Event()
    assert simulate(work, 2, timeout_s=S, run_timeout_s=20)[0] in (2.0,)


def test_a_dropped_group_leaves_no_thread_behind_even_without_the_garbage_collector():
    def drop_groups(group):
        for number in range(8):
            inner = group.subgroup(range(group.world_size), name=f"inner {number}")
            receiving = inner.recv(np.empty(3), 1 - group.rank, async_op=True)
            inner.send(np.ones(3), 1 - group.rank, async_op=True).wait()
            receiving.wait()
            inner.sendrecv(np.ones(3), np.empty(3), 1 - group.rank)
            del inner, receiving

    gc.disable()
    try:
        simulate(drop_groups, 2)
        deadline = time.monotonic() + 3  # shorter than an idle thread waits for more work
        while any("inner" in thread.name for thread in threading.enumerate()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not [thread.name for thread in threading.enumerate() if "inner" in thread.name]
    finally:
        gc.enable()
