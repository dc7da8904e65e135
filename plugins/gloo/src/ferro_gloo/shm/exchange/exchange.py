"""ShmExchange: a persistent exchange whose messages go through shared memory, without sockets."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ferro.errors import GroupClosed, PeerLost, with_awaited
from ferro.types import Array
from ferro_gloo.shm.exchange.memory import ExchangeMemory
from ferro_gloo.shm.exchange.native_steps import Steps
from ferro_gloo.shm.slot_ring import PEER_CHECK_S
from ferro_gloo.tcp.backend import TcpBackend


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """How often a wait looks before it sleeps: after a pause, and after it has yielded the core."""

    spins: int
    yields: int


class ShmExchange:
    """One rank's persistent exchange; see `ferro.collectives.fast_path.PersistentExchange`.

    Args:
        steps: moves the messages.
        tcp: the same ranks over TCP, which notices a lost rank or an abort.
        peers: the other rank of each message: of the sends, then of the receives.
        carried: the messages, by their indices, with which a started step goes on beside the program, since another
            rank may wait for them: see `ProgressThread`.
        waiting: see there.
        memory: of this process.
        area: this rank's channels.
        channels: their offsets in it.
    """

    has_progress = True

    def __init__(
        self,
        steps: Steps,
        tcp: TcpBackend,
        peers: Sequence[int],
        *,
        carried: Container[int],
        waiting: Waiting,
        memory: ExchangeMemory,
        area: Array,
        channels: Sequence[int],
    ) -> None:
        self._steps = steps
        self._tcp = tcp
        self._peers = peers
        self._carried = carried
        self._waiting = waiting
        self._memory = memory
        self._area: Array | None = area
        self._channels = channels
        self.test = steps.progress
        memory.add(self)

    def __call__(self) -> bool:
        """Run a step; return False if it has not ended after a short wait."""
        return self._steps()

    def start(self) -> None:
        """Begin a step; the messages that fit into their channels are sent at once."""
        if self._steps.begin():
            return
        if any(index in self._carried for index in self._steps.awaited()):
            self._memory.progress_thread.add(self._steps)

    def finish(self, *, deadline: float) -> None:
        """Wait until the step has ended.

        Raises:
            TimeoutError, PeerLost, GroupClosed.
        """
        try:
            spins, yields, seconds = self._waiting.spins, self._waiting.yields, PEER_CHECK_S
            while not self._steps.wait(spins, yields, seconds):
                self._check_peers()
                spins = yields = 0
                seconds = min(PEER_CHECK_S, deadline - time.monotonic())
                if seconds <= 0:
                    raise with_awaited(self._tcp.timeout(), self._awaited())
        except BaseException:
            self._memory.progress_thread.discard(self._steps)
            raise

    def close(self) -> None:
        """Let go of the arrays, and tell the senders; a forked child tells nobody. Idempotent."""
        area, self._area = self._area, None
        if area is None:
            return
        if self._memory.is_in_child():
            self._steps.close(False)
            return
        self._memory.progress_thread.discard(self._steps)
        self._steps.close(True)
        self._memory.keep(area, self._channels)

    def release(self) -> None:
        """See `Releasable.release`."""
        self.close()

    def __del__(self) -> None:
        with suppress(AttributeError):  # __init__ did not end
            self.close()

    def _awaited(self) -> list[int]:
        """List the ranks, by which errors name them, whose messages have not ended."""
        return [self._tcp.names[peer] for peer in self._awaited_peers()]

    def _awaited_peers(self) -> list[int]:
        return list(dict.fromkeys(self._peers[index] for index in self._steps.awaited()))

    def _check_peers(self) -> None:
        if self._area is None:
            raise GroupClosed("the exchange was closed while a step of it was under way")
        peers = self._awaited_peers()
        try:
            self._tcp.check_peers(peers)
        except PeerLost:
            # The peer may have moved the last block of this step, and then left.
            if not self._steps.progress():
                raise
        except GroupClosed as error:
            raise with_awaited(error, self._awaited())  # noqa: B904 - the same error
