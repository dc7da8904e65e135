"""A backend that writes only send, recv and close has everything else by the defaults."""

import threading
import time
from collections import defaultdict, deque

import numpy as np
import pytest

from ferro.backend import Backend
from ferro.collectives import Choice, get
from ferro.errors import CollectiveMismatch, GroupClosed, PeerLost
from ferro.group.group_info import GroupInfo
from ferro.group.process_group import ProcessGroup
from ferro.rendezvous import MemoryStore
from ferro_testing.conformance import CHECKS, Case, attempt
from ferro_testing.outcome import Outcome


class Switchboard:
    """What the ranks of one world share: wires, messages kept for later, and who has left."""

    def __init__(self):
        self.wires = defaultdict(deque)
        self.kept = defaultdict(deque)
        self.gone = set()
        self.change = threading.Condition()


class MinimalBackend(Backend):
    """The harshest reading of the contract: a send returns only when its peer receives from it."""

    def __init__(self, board, rank, world_size, choice=None):
        super().__init__(rank, world_size, choice)
        self._board = board

    def send(self, buffer, peer, *, tag, deadline):
        taken = threading.Event()
        with self._board.change:
            self._board.wires[self.rank, peer].append((tag, buffer, taken))
            self._board.change.notify_all()
            self._wait(taken.is_set, peer, deadline)

    def recv(self, buffer, peer, *, tag, deadline):
        kept = self._board.kept[peer, self.rank, tag]
        with self._board.change:
            self._wait(lambda: self._listen(peer) or kept, peer, deadline)
            message = kept.popleft()
        if message.nbytes != buffer.nbytes:
            raise CollectiveMismatch("a message of another size", peer=peer)
        buffer[...] = message.view(buffer.dtype)

    def _listen(self, peer):
        wire = self._board.wires[peer, self.rank]
        while wire:
            tag, buffer, taken = wire.popleft()
            self._board.kept[peer, self.rank, tag].append(buffer.copy())
            taken.set()
            self._board.change.notify_all()

    def close(self):
        with self._board.change:
            self._board.gone.add(self.rank)
            self._board.change.notify_all()

    def _wait(self, condition, peer, deadline):
        gone = self._board.gone
        met = self._board.change.wait_for(
            lambda: condition() or peer in gone or self.rank in gone, max(0.0, deadline - time.monotonic())
        )
        if condition():
            return
        if self.rank in gone:
            raise GroupClosed("closed")
        if peer in gone:
            raise PeerLost("it has left", peer=peer)
        assert not met
        raise TimeoutError


def run_threads(function, world_size, args, *, timeout_s, deterministic, choice=None) -> list[Outcome]:
    board, store = Switchboard(), MemoryStore()
    outcomes: list[Outcome | None] = [None] * world_size

    def on_rank(rank):
        rules = choice or Choice(deterministic=deterministic)
        members = GroupInfo(
            name="world",
            backend_name="minimal",
            global_ranks=tuple(range(world_size)),
            hosts=("here",) * world_size,
            job_store=store,
            store=store.prefix("group/0"),
            timeout_s=timeout_s,
        )
        group = ProcessGroup(MinimalBackend(board, rank, world_size, rules), members)
        outcomes[rank], error = attempt(function, group, args)
        group.close() if error is None else group.abandon()

    threads = [threading.Thread(target=on_rank, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [
        outcome or Outcome(rank=rank, error_type="Late", error_text="did not end")
        for rank, outcome in enumerate(outcomes)
    ]


# Few sizes and dtypes: the simulated backend covers the others by the same defaults.
CASE = Case(
    backend="minimal",
    world_sizes=(1, 2, 3),
    dtypes=("bool", "int8", "uint64", "bfloat16", "float32", "complex64"),
    unsupported={"shrink": "it has send, recv and close only"},
    timeout_s=30.0,
    runner=run_threads,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_minimal_backend_conforms(check):
    check(CASE)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize(
    ("collective", "algorithm"),
    [
        ("all_reduce", "ring"),
        ("all_reduce", "tree"),
        ("all_reduce", "direct"),
        ("all_reduce", "exchange"),
        ("reduce", "tree"),
        ("reduce_scatter", "ring"),
    ],
)
def test_a_mean_is_right_with_every_algorithm(collective, algorithm, world_size):
    def mean(group):
        x = np.arange(world_size * 3.0) + group.rank
        if collective == "reduce":
            return group.reduce(x, 0, "mean")
        return getattr(group, collective)(x, "mean")

    choice = Choice(fixed={collective: get(collective, algorithm)})
    outcomes = run_threads(mean, world_size, (), timeout_s=10.0, deterministic=False, choice=choice)
    assert all(outcome.ok for outcome in outcomes), outcomes
    wanted = np.arange(world_size * 3.0) + (world_size - 1) / 2
    if collective == "reduce_scatter":
        np.testing.assert_array_equal(np.concatenate([o.result for o in outcomes]), wanted)
    else:
        np.testing.assert_array_equal(outcomes[0].result, wanted)


def test_a_lost_peer_is_named_by_its_rank_in_the_subgroup():
    def work(group):
        if group.rank == 0:
            return None
        inner = group.subgroup([3, 2, 1])
        if group.rank == 3:
            raise ZeroDivisionError
        try:
            inner.all_reduce(np.ones(2))
        except PeerLost as error:
            return [error.peer, str(error)]

    outcomes = run_threads(work, 4, (), timeout_s=10.0, deterministic=False)
    assert outcomes[3].error_type == "ZeroDivisionError"
    for rank in (1, 2):
        peer, text = outcomes[rank].result
        assert peer == 0
        assert "rank 0 (rank 3 of the world, host here) of 3 is gone" in text
        assert "Read the log of rank 3 of the world first" in text
