"""LateSteps: waits for the other ranks of a step, and finds out why they do not come."""

from __future__ import annotations

import sys
import time
from functools import partial

from ferro.collectives.fast_path import BUSY, Turn
from ferro.collectives.label import Call, mismatch
from ferro.errors import CollectiveMismatch, GroupClosed, PeerLost, with_awaited
from ferro_gloo.shm.exchange.memory import ExchangeMemory
from ferro_gloo.shm.rooted.native_steps import RootedSteps
from ferro_gloo.shm.slot_ring import PEER_CHECK_S, SlotRing
from ferro_gloo.tcp.backend import TcpBackend


class LateSteps:
    """Ends the steps of a rooted collective for which other ranks are late.

    Args:
        call: what every rank must call.
        turn: the order of the group's collectives.
        ring: the slots of its other collectives.
        tcp: the same ranks over TCP, which notices a lost rank or an abort.
        memory: of this process.
        patience: how often to spin, and to yield, before this rank sleeps.
    """

    def __init__(
        self, call: Call, turn: Turn, ring: SlotRing, tcp: TcpBackend, memory: ExchangeMemory, patience: tuple[int, int]
    ) -> None:
        self._call = call
        self._turn = turn
        self._ring = ring
        self._tcp = tcp
        self._memory = memory
        self._patience = patience

    def __call__(self, steps: RootedSteps) -> None:
        """Wait until the step has ended, or raise an error, with which the group ends on all ranks."""
        self._turn.late(self._call.numbered(steps.order()), partial(self._wait, steps))

    def refuse_close(self, writer: int, order: int) -> None:
        """End the group, if it is open: this rank will not read a step that another one has written.

        Where an exception leads to that, it says more.
        """
        if self._turn.state[BUSY] or sys.exc_info()[1] is not None:
            return
        own, other = self._tcp.names[self._tcp.rank], self._tcp.names[writer]
        text = f"rank {own} has left out a step of {self._call}, which rank {other} made as its collective #{order}"

        def refuse(*, deadline: float) -> None:
            raise CollectiveMismatch(text, peer=other)

        self._turn.late(self._call, refuse)

    def _wait(self, steps: RootedSteps, *, deadline: float) -> None:
        (spins, yields), seconds = self._patience, PEER_CHECK_S
        steps.tell_late()
        try:
            while not steps.wait(spins, yields, seconds):
                self._check(steps)
                spins = yields = 0
                seconds = min(PEER_CHECK_S, deadline - time.monotonic())
                if seconds <= 0:
                    raise with_awaited(self._tcp.timeout(), self._names(steps.awaited()))
        except BaseException:
            self._memory.progress_thread.discard(steps)
            raise

    def _check(self, steps: RootedSteps) -> None:
        """Raise an error if the step never will end."""
        if steps.is_closed():
            raise GroupClosed("the collective was closed while a step of it was under way")
        self._compare_orders(steps)
        peers = steps.awaited()
        self._find_other_call(steps, peers)
        try:
            self._tcp.check_peers(peers)
        except PeerLost:
            # The peer may have written this step, its last one, and then left.
            if not steps.progress():
                raise
        except GroupClosed as error:
            raise with_awaited(error, self._names(peers))  # noqa: B904 - the same error

    def _compare_orders(self, steps: RootedSteps) -> None:
        """Find a rank whose step is another one: its number in the group differs.

        Raises:
            CollectiveMismatch: there is one.
        """
        other = steps.other()
        if other is not None:
            names, (rank, theirs, mine) = self._tcp.names, other
            raise CollectiveMismatch(
                f"rank {names[self._tcp.rank]} made this step of {self._call} as its collective #{mine}, "
                f"rank {names[rank]} as its collective #{theirs}: one of them has left out a step, or another call",
                peer=names[rank],
            )

    def _find_other_call(self, steps: RootedSteps, awaited: list[int]) -> None:
        """Find a rank that has gone on to another call.

        A rank that has gone on has written this step before, or has deferred it. So that is looked at last.

        Raises:
            CollectiveMismatch: there is one.
        """
        turn, names = self._turn, self._tcp.names
        for rank in awaited:
            number = steps.late_elsewhere(rank)
            if number is not None:  # it may wait for this rank, as this one does for it
                text = f"rank {names[self._tcp.rank]} called {self._call} as its collective #{steps.order()}, rank"
                text = f"{text} {names[rank]} made a step of persistent operation {number} instead"
                raise CollectiveMismatch(text, peer=names[rank])
        passed = {rank: steps.passed(rank) for rank in awaited}
        labels = {} if turn.pending or turn.lock.locked() else self._ring.calls_ahead(awaited)
        for rank in awaited:
            gone_on = passed[rank] is not None or rank in labels
            if not gone_on or steps.is_deferred(rank) or steps.progress() or rank not in steps.awaited():
                continue
            if rank in labels:
                raise mismatch(names[self._tcp.rank], self._call, names[rank], labels[rank])
            text = f"rank {names[self._tcp.rank]} called {self._call}; rank {names[rank]} has left it out, and has made"
            raise CollectiveMismatch(f"{text} {passed[rank]} collectives", peer=names[rank])

    def _names(self, ranks: list[int]) -> list[int]:
        return [self._tcp.names[rank] for rank in ranks]
