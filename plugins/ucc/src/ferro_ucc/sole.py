"""What needs no UCC: refusing messages between two ranks, and groups of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from ferro.backend import Backend
from ferro.collectives import Choice
from ferro.errors import UnsupportedError
from ferro.types import Array


class NoTransfers(Backend):
    """No messages between two ranks: UCC has collectives only."""

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Refuse."""
        _refuse("send")

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Refuse."""
        _refuse("recv")

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """Refuse, but for nothing at all."""
        if sends or recvs:
            _refuse("sendrecv")


class SoleBackend(NoTransfers):
    """A group of one rank, for which core's schedules move nothing and UCC is not asked."""

    def __init__(self, choice: Choice | None = None) -> None:
        super().__init__(0, 1, choice)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Return another group of one rank."""
        return SoleBackend(self.choice)

    def close(self) -> None:
        """Do nothing: nothing is open."""


def _refuse(op: str) -> NoReturn:
    raise UnsupportedError(
        f"{op}: UCC has collectives only, no messages between two ranks. Use a backend that has "
        "them, such as mpi or gloo, alone or for transfers beside ucc (HybridBackend)",
        op=op,
    )
