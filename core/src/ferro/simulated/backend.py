"""The simulated backend: ranks are threads of one process, messages are copies in memory.

It moves real data through the same schedules as a real backend, so it is where everything built
on a group can be tried first, with many ranks, faults and a model of the network.
"""

from __future__ import annotations

from collections.abc import Sequence

from ferro.backend import Backend
from ferro.collectives.choice import Choice
from ferro.collectives.label import in_context
from ferro.collectives.network import Network
from ferro.errors import CollectiveMismatch, PeerLost
from ferro.simulated.board import Board, Fault
from ferro.types import Array


class SimulatedBackend(Backend):
    """One simulated rank of a group.

    Args:
        board: what the ranks share.
        ranks: the group's members by their numbers on the board.
        rank: this one's number in the group.
        choice: which algorithm serves which call.
        context: the group's number.
    """

    def __init__(
        self, board: Board, ranks: Sequence[int], rank: int, choice: Choice | None = None, context: int = 0
    ) -> None:
        super().__init__(rank, len(ranks), choice)
        self._board = board
        self._ranks = tuple(ranks)
        self._context = context

    @classmethod
    def create_group(
        cls,
        world_size: int,
        *,
        choice: Choice | None = None,
        faults: Sequence[Fault] = (),
        network: Network | None = None,
    ) -> list[SimulatedBackend]:
        """Return the backends of a whole world, one a rank, each to be used by its own thread.

        Raises:
            UsageError: `world_size` is less than 1.
        """
        board = Board(world_size, faults, network)
        return [cls(board, range(world_size), rank, choice) for rank in range(world_size)]

    @property
    def clock_s(self) -> float:
        """This rank's virtual time in seconds: 0.0 at first, moved on by the network model."""
        return self._board.clocks[self._ranks[self.rank]]

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Leave a copy; never blocks."""
        me, to = self._ranks[self.rank], self._ranks[peer]
        try:
            self._board.put(me, to, in_context(tag, self._context), buffer)
        except PeerLost as error:
            raise PeerLost(str(error), peer=peer) from None

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Wait for the message."""
        me, source = self._ranks[self.rank], self._ranks[peer]
        try:
            message = self._board.take(source, me, in_context(tag, self._context), deadline)
        except PeerLost as error:
            raise PeerLost(str(error), peer=peer) from None
        if message.nbytes != buffer.nbytes:
            raise CollectiveMismatch(
                f"rank {self.rank} expected {buffer.nbytes} bytes; rank {peer} sent {message.nbytes}", peer=peer
            )
        buffer[...] = message.view(buffer.dtype)

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """Send, then receive: sending never blocks here, so no threads are needed."""
        for peer, buffer in sends:
            self.send(buffer, peer, tag=tag, deadline=deadline)
        for peer, buffer in recvs:
            self.recv(buffer, peer, tag=tag, deadline=deadline)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Return the group with a context of its own, so that it can be aborted by itself."""
        members = [self._ranks[rank] for rank in ranks]
        index = tuple(ranks).index(self.rank)
        return SimulatedBackend(self._board, members, index, self.choice, context)

    def shrink(self, ranks: Sequence[int], context: int) -> Backend:
        """Return the survivors' group: connections between the living outlast a group."""
        return self.subgroup(ranks, context)

    def abort(self) -> None:
        """Wake every rank that waits in this group."""
        self._board.abort(self._context)

    def close(self) -> None:
        """Leave the world; a subgroup's end leaves the rank where it is."""
        if self._context == 0:
            self._board.leave(self._ranks[self.rank])
