"""Failures by a deadline, by NCCL's error code, by an abort, by a death end all ranks."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from ferro import CollectiveTimeout, FerroError, GroupClosed, PeerLost
from ferro.errors import BackendError

from .conftest import Ranks

SHORT_S = 0.3


def failure_of(group, machine, call):
    """Get the error of a call, which it raises itself or a later call raises."""
    deadline = time.monotonic() + 10
    try:
        call()
        while time.monotonic() < deadline:
            group.all_reduce(machine.array([1.0]), timeout_s=5)
            machine.current_stream().synchronize()
    except FerroError as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("where", ["gpu", "host"])
def test_a_rank_that_stays_away_is_named_and_all_end(machine, on_ranks, where):
    ended = threading.Event()

    def work(group):
        if group.rank == 2:
            assert ended.wait(10)
            return None
        values = np.ones(3)
        given = machine.array(values) if where == "gpu" else values

        def call():
            handle = group.all_reduce(given, timeout_s=SHORT_S, async_op=True)
            if where == "gpu":  # the host may be anywhere; here it waits for the GPU
                machine.current_stream().wait_event(handle._completion.event)
                machine.current_stream().synchronize()
            handle.wait()

        error = failure_of(group, machine, call)
        with pytest.raises(GroupClosed, match="the group died earlier"):
            group.all_reduce(given)
        if group.rank == 0:
            ended.set()
        return type(error), error.missing, str(error)

    results = on_ranks(3, work)
    for rank in (0, 1):
        kind, missing, text = results[rank]
        assert kind is CollectiveTimeout
        assert missing == (2,)
        assert f"did not finish within {SHORT_S} s; arrived: rank 0, 1" in text
    over = [communicator.over for communicator in machine.nccl.communicators]
    assert over.count("aborted") >= 2  # the third may have left before it heard of it


@pytest.mark.parametrize("code", [1, 2, 3, 6, 8])
def test_an_error_code_of_nccl_ends_an_operation_on_all_ranks(machine, on_ranks, code):
    """Codes 7 and 8 are not in CuPy's table of messages: it raises KeyError."""

    def work(group):
        unblock = machine.block(group.backend._queue.stream)
        handle = group.all_reduce(machine.array([1.0]), async_op=True)
        if group.rank == 1:
            group.backend._queue.communicator._native.error = code
        error = failure_of(group, machine, lambda: wait_until_done(handle))
        unblock.set()
        return type(error), str(error)

    results = on_ranks(2, work)
    assert {kind for kind, _ in results.values()} == {GroupClosed}
    assert any(f"NCCL reports error {code}" in text for _, text in results.values())
    assert {c.over for c in machine.nccl.communicators} == {"aborted"}


def wait_until_done(handle):
    deadline = time.monotonic() + 10
    while not handle.done():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    handle.wait()


def test_an_operation_in_progress_is_no_error(machine, on_ranks):
    def work(group):
        unblock = machine.block(group.backend._queue.stream)
        group.backend._queue.communicator._native.error = 7
        handle = group.all_reduce(machine.array([1.0]), async_op=True)
        checked = [group.backend._queue.poll() for _ in range(3)]
        unblock.set()
        return checked, machine.host(handle.wait()).tolist()

    assert on_ranks(2, work) == dict.fromkeys(range(2), ([True] * 3, [2.0]))


def test_an_argument_that_nccl_refuses_ends_the_group_with_its_code(machine, on_ranks, monkeypatch):
    def work(group):
        native = group.backend._queue.communicator
        monkeypatch.setattr(native, "all_reduce", lambda *_: native.send(0, 1, 99, 0, 0))
        with pytest.raises(GroupClosed, match="BackendError: NCCL refused: NCCL_ERROR 4") as caught:
            group.all_reduce(machine.array([1.0]))
        return caught.value.__cause__.code

    assert on_ranks(1, work) == {0: 4}


def test_work_that_failed_on_the_gpu_is_told(machine, on_ranks):
    def work(group):
        handle = group.all_reduce(machine.array([1.0]), async_op=True)
        machine.copies_failed = 700
        try:
            assert handle.done()
            with pytest.raises(GroupClosed, match="work on GPU 0 failed: cudaError 700"):
                handle.wait()
        finally:
            machine.copies_failed = None

    on_ranks(1, work)


def test_abort_on_one_rank_ends_the_others(machine, on_ranks):
    def work(group):
        if group.rank == 0:
            group.abort()
            return None
        with pytest.raises(GroupClosed) as caught:
            group.barrier()
        return str(caught.value)

    results = on_ranks(3, work)
    assert "was aborted by rank 0" in results[1]
    assert results[1] == results[2]


@pytest.mark.parametrize("symptom", [0, 6])
def test_a_rank_that_died_is_named_by_its_rank_in_the_group(machine, symptom):
    """The same holds where NCCL notices first that a connection broke."""
    died = threading.Event()

    def work(group):
        groups = [group, group.split(0, key=-group.rank)]
        if group.rank:
            groups.append(group.subgroup([3, 1, 2]))
        if group.rank == 2:
            ranks.lost.add(2)
            died.set()
            return None
        assert died.wait(10)
        peers = []
        for one in groups:
            one.backend._queue.communicator._native.error = symptom
            with pytest.raises(PeerLost, match="job's store noticed") as caught:
                one.barrier()
            peers.append(caught.value.peer)
        return peers

    ranks = Ranks(machine, 4)
    ranks.start(work)
    assert ranks.join() == {0: [2, 1], 1: [2, 1, 2], 2: None, 3: [2, 1, 2]}
    assert ranks.errors == {}


def test_a_death_outside_the_group_does_not_end_it(machine):
    def work(group):
        part = group.split(group.rank // 2)
        if group.rank == 3:
            ranks.lost.add(3)
        if group.rank >= 2:
            return None
        part.backend._queue._check_other_ranks()
        return machine.host(part.all_reduce(machine.array([1.0]))).tolist()

    ranks = Ranks(machine, 4)
    ranks.start(work)
    assert ranks.join() == {0: [2.0], 1: [2.0], 2: None, 3: None}
    assert ranks.errors == {}


def test_close_lets_what_was_launched_end(machine, on_ranks):
    def work(group):
        x = machine.array(np.ones(3))
        unblock = machine.block(group.backend._queue.stream)
        total = group.all_reduce(x)
        threading.Timer(0.05, unblock.set).start()
        group.close()
        return machine.host(total).tolist()

    assert on_ranks(2, work) == dict.fromkeys(range(2), [2.0] * 3)
    assert {c.over for c in machine.nccl.communicators} == {"destroyed"}


def test_close_aborts_what_does_not_end(machine, on_ranks, monkeypatch):
    monkeypatch.setattr("ferro_nccl.backend._CLOSE_S", 0.05)

    def work(group):
        if group.rank == 0:
            group.all_reduce(machine.array([1.0]))
        group.close()
        group.close()

    on_ranks(2, work)
    assert sorted(c.over for c in machine.nccl.communicators) == ["aborted", "destroyed"]


def test_abort_that_gets_stuck_is_left_behind(machine, on_ranks, monkeypatch):
    monkeypatch.setattr("ferro_nccl.operation_queue._NATIVE_S", 0.05)
    stuck = threading.Event()

    def work(group):
        native = group.backend._queue.communicator
        monkeypatch.setattr(native, "abort", lambda: stuck.wait(10))
        group.abort()

    on_ranks(1, work)
    stuck.set()


@pytest.mark.parametrize("refused", [False, True], ids=["returns", "is refused"])
def test_a_launch_that_is_stuck_in_nccl_ends_by_its_deadline(machine, on_ranks, refused):
    """As the first transfer with a rank that does not come: it blocks the host inside NCCL."""

    def work(group):
        native = group.backend._queue.communicator
        aborted = threading.Event()
        end = native.abort

        def send(*_):
            assert aborted.wait(10)
            if refused:
                raise BackendError("NCCL refused: NCCL_ERROR 4", code=4)

        def abort():
            aborted.set()
            end()

        native.send, native.abort = send, abort
        if group.rank == 0:
            with pytest.raises(CollectiveTimeout):
                group.send(machine.array([1.0]), 1, timeout_s=SHORT_S)

    on_ranks(2, work)


def test_a_split_after_a_failure_is_not_begun(machine, on_ranks, monkeypatch):
    """A failure while the split waits for operations leaves no communicator to split."""

    def work(group):
        queue = group.backend._queue
        monkeypatch.setattr(queue, "drain", lambda deadline: group.backend.abort() or True)
        monkeypatch.setattr(queue.communicator, "split", lambda *_: pytest.fail("was split"))
        with pytest.raises(GroupClosed, match="was aborted"):
            group.backend.split([0], 7)

    on_ranks(1, work)


def test_a_group_whose_rank_failed_to_come_says_who(machine):
    ranks = Ranks(machine, 3, timeout_s=0.2)
    ranks.start(lambda group: None, ranks=(0, 2))
    ranks.join()
    for rank in (0, 2):
        assert f"rank {rank} " in str(ranks.errors[rank])
        assert "rank 1 did not come by the deadline" in str(ranks.errors[rank])


def test_a_connection_that_nccl_does_not_make_is_an_error(machine, monkeypatch):
    unblock = threading.Event()
    monkeypatch.setattr(machine.cupy["cupy.cuda"].nccl, "NcclCommunicator", lambda *_: unblock.wait(10))
    ranks = Ranks(machine, 2, timeout_s=0.1)
    ranks.start(lambda group: None)
    ranks.join()
    unblock.set()
    assert "all 2 ranks had come, but NCCL did not connect them" in str(ranks.errors[1])


def test_codes_of_cupys_exceptions(machine):
    communicator = machine.library().connect(1, b"x" * 128, 0)
    for code in range(9):
        communicator._native.error = code
        assert communicator.async_error() == code
    with pytest.raises(BackendError) as caught:
        communicator.send(0, 1, 1, 0, 0)
    assert caught.value.code == 4
