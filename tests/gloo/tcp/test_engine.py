"""The engine: several operations, groups and threads over the same sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import numpy as np
import pytest

import ferro
from ferro.collectives.label import in_context
from ferro_gloo.tcp import connection, engine, matching, protocol
from ferro_gloo.tcp.protocol import DATA, HEADER_BYTES, MAX_BODY, pack

LABEL = b"L" * 56


def test_messages_that_come_before_their_receive_are_kept_by_tag(on_ranks):
    def exchange(group):
        if group.rank == 0:
            for tag in range(5):
                group.send(np.full(10 * tag, tag), 1, tag)
            group.barrier()
            return None
        group.barrier()
        return [group.recv(np.zeros(10 * t, int), 0, t).tolist() for t in (4, 2, 0, 1, 3)]

    results = on_ranks(2, exchange)
    assert results[1] == [[t] * 10 * t for t in (4, 2, 0, 1, 3)]


@pytest.mark.parametrize("nbytes", [MAX_BODY - 1, MAX_BODY, MAX_BODY + 1, 3 * MAX_BODY + 5])
def test_transfers_around_the_size_of_a_frame(on_ranks, nbytes):
    data = np.random.default_rng(0).integers(0, 255, nbytes, np.uint8)

    def exchange(group):
        if group.rank == 0:
            group.send(data, 1)
            return True
        return bool((group.recv(np.empty(nbytes, np.uint8), 0) == data).all())

    assert on_ranks(2, exchange) == {0: True, 1: True}


def test_large_messages_both_ways_at_once_do_not_deadlock(on_ranks):
    def exchange(group):
        mine = np.full(5_000_000, group.rank, np.float32)
        theirs = group.sendrecv(mine, np.empty_like(mine), 1 - group.rank)
        return float(theirs[0]), float(theirs[-1])

    assert on_ranks(2, exchange) == {0: (1.0, 1.0), 1: (0.0, 0.0)}


def test_overlapping_groups_in_several_threads_never_mix(on_ranks):
    """Three groups share the sockets; each has its own thread and many operations in flight."""

    def busy(group):
        left, right = group.subgroup([0, 1, 2]) if group.rank < 3 else None, None
        if group.rank > 0:
            right = group.subgroup([3, 2, 1])
        wrong = []

        def use(which, factor):
            works = []
            for step in range(30):
                x = np.full(1 + 97 * step * factor, float(group.rank + step))
                works.append((step, which.all_reduce(x, async_op=True)))
            for step, work in works:
                expected = sum(r + step for r in which.global_ranks)
                if not (work.wait() == expected).all():
                    wrong.append((which.name, step))

        threads = [
            threading.Thread(target=use, args=(which, factor))
            for which, factor in ((group, 3), (left, 1), (right, 2))
            if which is not None
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return wrong

    assert on_ranks(4, busy) == {rank: [] for rank in range(4)}


def test_a_subgroup_that_dies_leaves_the_world_and_other_groups_alive(on_ranks):
    def mismatched_half(group):
        half = group.split(group.rank // 2)
        error = ""
        if group.rank < 2:
            try:
                half.all_reduce(np.ones(3 + group.rank))
            except ferro.CollectiveMismatch as raised:
                error = str(raised)
        else:
            assert half.all_reduce(1.0) == 2
        assert group.all_reduce(1.0) == 4
        return error

    results = on_ranks(4, mismatched_half)
    assert results[0] == results[1] != ""
    assert results[2] == results[3] == ""


def test_abort_wakes_a_rank_that_waits_for_ever(on_ranks):
    def abort(group):
        if group.rank == 0:
            group.recv(np.zeros(1), 1, tag=9, async_op=True)
            waiting = group.all_reduce(np.ones(3), async_op=True)
            group.abort()
            with pytest.raises(ferro.GroupClosed, match="aborted"):
                waiting.wait()
            return True
        with pytest.raises(ferro.GroupClosed, match="aborted by rank 0"):
            group.recv(np.zeros(1), 0, tag=3, timeout_s=20)
        return True

    started = time.monotonic()
    assert on_ranks(2, abort) == {0: True, 1: True}
    assert time.monotonic() - started < 20, "woken by the deadline, not by abort()"


def test_survivors_go_on_after_shrink(on_ranks):
    def survive(group):
        if group.rank == 1:
            group.abandon()
            return None
        with pytest.raises(ferro.PeerLost, match="rank 1") as caught:
            group.all_reduce(np.ones(1000))
        assert caught.value.peer == 1
        rest, again = group.shrink(), group.shrink()
        for number in range(3):  # two groups, each with messages of its own
            pending = rest.all_reduce(np.full(5, float(number)), async_op=True)
            assert float(again.all_reduce(10.0)) == 30.0
            assert pending.wait().tolist() == [3.0 * number] * 5
        return rest.rank, rest.global_ranks, float(rest.all_reduce(1.0))

    results = on_ranks(4, survive)
    assert results[0] == (0, (0, 2, 3), 3.0)
    assert results[3] == (2, (0, 2, 3), 3.0)


@pytest.fixture
def two_ends():
    """Both ends of a connection that keeps 64 KiB for each side."""
    with contextlib.ExitStack() as stack:
        yield [
            connection.Connection(stack.enter_context(sock), peer, set(), kept_limit=1 << 16)
            for peer, sock in enumerate(socket.socketpair())
        ]


def send(sender, tag, body, batch):
    sender.queue(pack(len(body), DATA, tag, LABEL), memoryview(body), batch)
    sender.flush()


def receive(receiver, tag, nbytes, batch):
    memory = bytearray(nbytes)
    receiver.post(tag, matching.PostedReceive(memoryview(memory), LABEL, batch))
    receiver.flush()
    return memory


def move(*ends):
    """Carry all that can go, in both directions."""
    for _ in range(3):
        for end in ends:
            end.flush()
            end.read(connection.ReadEvents())


@pytest.mark.parametrize("nbytes", [0, 8, 4096])
def test_messages_that_nobody_has_received_take_no_more_than_the_limit(two_ends, nbytes):
    sender, receiver = two_ends
    count = 3 * (1 << 16) // (nbytes + connection.KEPT_FRAME_BYTES)
    sent, received = matching.TransferBatch(0, count), matching.TransferBatch(0, count)
    for number in range(count):
        send(sender, number % 7, bytes([number % 256]) * nbytes, sent)
        receiver.read(connection.ReadEvents())
    assert (1 << 15) < receiver.kept_bytes <= 1 << 16
    assert sender.holds_back
    assert sent.remaining > count // 2
    bodies = [receive(receiver, number % 7, nbytes, received) for number in range(count)]
    move(sender, receiver)
    assert (sent.remaining, received.remaining, receiver.kept_bytes) == (0, 0, 0)
    assert bodies == [bytes([number % 256]) * nbytes for number in range(count)]
    send(sender, 1, bytes(1000), sent)
    assert not sender.holds_back, "credit for what was received has come back"


def test_a_receive_gets_its_message_past_any_number_of_others(two_ends):
    sender, receiver = two_ends
    sent, received = matching.TransferBatch(0, 201), matching.TransferBatch(0, 201)
    for number in range(200):
        send(sender, number, bytes(4096), sent)
        receiver.read(connection.ReadEvents())
    memory = receive(receiver, 999, 4096, received)
    send(sender, 999, b"x" * 4096, sent)
    move(receiver, sender)
    assert memory == b"x" * 4096
    assert received.remaining == 200
    assert receiver.kept_bytes <= 1 << 16
    for number in reversed(range(200)):
        receive(receiver, number, 4096, received)
        move(sender, receiver)
    assert (sent.remaining, received.remaining) == (0, 0)


def test_what_is_held_back_ends_with_its_group_and_with_the_connection(two_ends):
    sender, receiver = two_ends
    sent, received = matching.TransferBatch(0, 100), matching.TransferBatch(0, 2)
    for _ in range(100):
        send(sender, 5, bytes(4096), sent)
        receiver.read(connection.ReadEvents())
    sender.drop_group(0)
    assert not sender.holds_back
    in_another_group = in_context(5, 1)
    send(sender, in_another_group, bytes(1 << 16), matching.TransferBatch(1, 1))
    move(sender, receiver)
    receive(receiver, in_another_group, 1 << 16, received)
    sender.sock.close()
    receiver.read(connection.ReadEvents())
    assert isinstance(received.error, protocol.ConnectionLostError)
    late = matching.TransferBatch(0, 1)
    for _ in range(100):  # those that came whole are still given out
        receive(receiver, 5, 4096, late)
    assert isinstance(late.error, protocol.ConnectionLostError)


def test_a_frame_that_is_none_of_ours_loses_the_connection():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        receiver = connection.Connection(ours, 7, set(), kept_limit=1 << 20)
        batch = matching.TransferBatch(0, 1)
        receiver.post(5, matching.PostedReceive(memoryview(bytearray(8)), bytes(56), batch))
        theirs.sendall(pack(MAX_BODY + 1, DATA, 5, bytes(56)))
        receiver.read(connection.ReadEvents())
        assert isinstance(batch.error, protocol.ConnectionLostError)
        assert "none of ours" in str(batch.error)


def test_frames_cut_at_every_byte_arrive_whole():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        receiver = connection.Connection(ours, 1, set(), kept_limit=1 << 20)
        bodies = [bytes([i]) * i for i in range(6)]
        memory = [bytearray(i) for i in range(6)]
        batch = matching.TransferBatch(0, 6)
        for i in range(6):
            receiver.post(3, matching.PostedReceive(memoryview(memory[i]), b"L" * 56, batch))
        stream = b"".join(pack(len(b), DATA, 3, b"L" * 56) + b for b in bodies)
        assert len(stream) == 6 * HEADER_BYTES + sum(map(len, bodies))
        for i in range(len(stream)):
            theirs.sendall(stream[i : i + 1])
            receiver.read(connection.ReadEvents())
        assert batch.remaining == 0
        assert [bytes(m) for m in memory] == bodies


def test_memory_of_an_aborted_receive_is_not_written_afterwards():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        receiver = connection.Connection(ours, 1, set(), kept_limit=1 << 20)
        memory = bytearray(b"." * 64)
        receiver.post(5, matching.PostedReceive(memoryview(memory), bytes(56), matching.TransferBatch(0, 1)))
        frame = pack(64, DATA, 5, bytes(56)) + b"x" * 64
        theirs.sendall(frame[:-32])
        receiver.read(connection.ReadEvents())
        receiver.drop_group(0)
        memory[:] = b"mine" * 16  # its owner has it back
        theirs.sendall(frame[-32:])
        receiver.read(connection.ReadEvents())
        assert bytes(memory) == b"mine" * 16


def test_a_long_send_that_nobody_receives_yet_holds_nobody_up(on_ranks):
    """Only its first frame travels before its receive, though it is over the limit."""

    def exchange(group):
        long = np.full(40 << 20, group.rank, np.uint8)
        if group.rank == 0:
            sending = group.send(long, 1, async_op=True)
            total = float(group.all_reduce(1.0))
            sending.wait()
            return total
        total = float(group.all_reduce(1.0))
        early = group._backend._flat._engine._connections[0].kept_bytes
        assert early <= MAX_BODY + connection.KEPT_FRAME_BYTES
        assert not group.recv(long, 0).any()
        return total

    assert on_ranks(2, exchange) == {0: 2.0, 1: 2.0}


def test_a_receive_that_waits_holds_up_no_transfer_with_another_tag(on_ranks):
    def exchange(group):
        other = 1 - group.rank
        waiting = group.recv(np.zeros(2), other, tag=5, async_op=True)
        mine, theirs = np.full(3, float(group.rank)), np.empty(3)
        group.sendrecv(mine, theirs, other, tag=6)
        group.send(np.ones(2), other, tag=5)
        return theirs.tolist(), waiting.wait().tolist()

    assert on_ranks(2, exchange) == {r: ([1.0 - r] * 3, [1.0, 1.0]) for r in range(2)}


def test_a_thread_that_has_the_lock_may_drop_a_group(on_ranks):
    """As when the garbage collector runs there: dropping a group wakes its thread."""

    def drop(group):
        own = group._backend._flat._engine
        part = group.subgroup([0, 1])
        part.recv(np.empty(1), 1 - part.rank, async_op=True)  # its thread waits for a message
        part.send(np.zeros(1), 1 - part.rank)
        with own._lock:
            part._dispatcher._transfers.close(0.0)
        return True

    assert on_ranks(2, drop) == {0: True, 1: True}


def test_rows_that_one_rank_sends_and_the_other_does_not_expect_are_a_mismatch(on_ranks):
    def exchange(group):
        x = np.zeros((4, 100_000))
        expected = [2, 2] if group.rank == 0 else [1, 2]
        with pytest.raises(ferro.CollectiveMismatch) as caught:
            group.all_to_all(x, send_sizes=[2, 2], recv_sizes=expected)
        return str(caught.value)

    results = on_ranks(2, exchange)
    assert results[0] == results[1]
    assert "rank 0 sends 2 rows to rank 1 in all_to_all; rank 1 expects 1" in results[0]


def test_a_send_beyond_the_limit_that_nobody_receives_is_an_error_that_names_the_limit(on_ranks, monkeypatch):
    monkeypatch.setattr(engine, "KEPT_LIMIT_BYTES", 1 << 20)

    def send_and_send(group):
        for _ in range(3000):
            group.send(np.ones(1), 1, timeout_s=0.5)

    def exchange(group):
        with pytest.raises(ferro.CollectiveTimeout) as caught:
            send_and_send(group) if group.rank == 0 else group.recv(np.ones(1), 0, tag=9, timeout_s=20)
        return str(caught.value)

    results = on_ranks(2, exchange)
    assert "rank 1 has not received what rank 0 sent: a rank keeps up to" in results[0]


def test_more_than_the_limit_is_sent_in_the_background_and_received_last_first(on_ranks, monkeypatch):
    monkeypatch.setattr(engine, "KEPT_LIMIT_BYTES", 1 << 20)

    def exchange(group):
        if group.rank == 0:
            works = [group.send(np.full(40_000, tag), 1, tag, async_op=True) for tag in range(20)]
            group.barrier()
            for work in works:
                work.wait()
            return True
        group.barrier()
        return all((group.recv(np.empty(40_000, int), 0, tag) == tag).all() for tag in reversed(range(20)))

    assert on_ranks(2, exchange) == {0: True, 1: True}
