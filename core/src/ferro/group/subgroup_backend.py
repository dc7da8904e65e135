"""SubgroupBackend: a group inside a group, for backends that have nothing better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ferro.backend import Backend, Completion
from ferro.collectives.label import in_context
from ferro.errors import PeerLost
from ferro.types import Array


class SubgroupBackend(Backend):
    """A group inside a group: the parent's transfers, with ranks and tags translated.

    The default for backends that have nothing better. Aborting it aborts the parent as well,
    for the two share what blocks.
    """

    def __init__(self, parent: Backend, ranks: Sequence[int], context: int) -> None:
        super().__init__(tuple(ranks).index(parent.rank), len(ranks), parent.choice)
        self.labels_frames = False
        self.devices, self.streams = parent.devices, parent.streams
        self._parent = parent
        self._ranks = tuple(ranks)
        self._context = context

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Send through the parent."""
        tag = in_context(tag, self._context)
        with self._own_ranks():
            self._parent.send(buffer, self._ranks[peer], tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Receive through the parent."""
        tag = in_context(tag, self._context)
        with self._own_ranks():
            self._parent.recv(buffer, self._ranks[peer], tag=tag, deadline=deadline)

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """Exchange through the parent."""
        with self._own_ranks():
            self._parent.exchange(
                [(self._ranks[peer], buffer) for peer, buffer in sends],
                [(self._ranks[peer], buffer) for peer, buffer in recvs],
                tag=in_context(tag, self._context),
                deadline=deadline,
            )

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Make a group of some of these ranks, out of the outermost parent."""
        return subgroup_backend(self._parent, [self._ranks[rank] for rank in ranks], context)

    def launched(self) -> Completion:
        """Return the parent's: its queue is this group's."""
        return self._parent.launched()

    def allocate(self, nbytes: int) -> Array:
        """Return the parent's memory."""
        return self._parent.allocate(nbytes)

    def abort(self) -> None:
        """Abort the parent."""
        self._parent.abort()

    def close(self) -> None:
        """Do nothing: what is open belongs to the parent."""

    @contextmanager
    def _own_ranks(self) -> Iterator[None]:
        """Name the peer in a parent's error by its rank in this group."""
        try:
            yield
        except PeerLost as error:
            peer = self._ranks.index(error.peer) if error.peer in self._ranks else None
            raise PeerLost(str(error), peer=peer, host=error.host) from error


def subgroup_backend(parent: Backend, ranks: Sequence[int], context: int) -> Backend:
    """Make the backend of a group of some of the parent's ranks: its own kind, or the default."""
    made = parent.subgroup(ranks, context)
    return SubgroupBackend(parent, ranks, context) if made is None else made


def split_backend(parent: Backend, ranks: Sequence[int] | None, context: int) -> Backend | None:
    """Part a group into several at once; None on a rank that joins none of them."""
    made = parent.split(ranks, context)
    if made is None and ranks is not None:
        return SubgroupBackend(parent, ranks, context)
    return made
