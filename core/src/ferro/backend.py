"""Backend: the contract that a communication backend implements.

An author writes `send`, `recv` and `close`. Everything else has a default built on those, and is
overridden where the library below can do better. `ProcessGroup` checks every call first, so a
backend sees only one-dimensional contiguous buffers of a dtype and device that it declared, and
never a user's array.

What a backend raises: `TimeoutError` when a deadline passes, `PeerLost(peer=…)` when a rank is
gone, `CollectiveMismatch` when labels differ, `GroupClosed` after `abort`. The group adds where
it happened and tells the other ranks.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ferro.calls import LABEL_BYTES, Call, collective_tag
from ferro.collectives.choose import Choice, build
from ferro.collectives.chunks import blocks, near_equal
from ferro.collectives.execute import Execution
from ferro.errors import CollectiveMismatch, UnsupportedError
from ferro.reduction import Reduction
from ferro.types import Array, Device

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

# A bound that is never met: threads are made only when none is idle, and a sender that waits for
# its peer must not hold up those of another group.
_SENDERS = 4096

# Calls in which some ranks only send, and so would not notice a rank that calls something else:
# the root in those that give, the others in those that collect.
_GIVING = ("broadcast", "scatter")
_COLLECTING = ("reduce", "gather")
_STAR_RANKS = 16  # up to so many, all of them can tell rank 0 at once
_NOTHING = np.empty(0, np.uint8)


class Completion(Protocol):
    """The end of operations that were launched on a device's queue."""

    def done(self) -> bool:
        """Say whether they have ended. Never blocks."""

    def wait(self) -> None:
        """Let what this thread does next on the device come after them; raise their failure.

        It need not wait itself: the device's queue does.
        """


class Backend(ABC):
    """Moves buffers between the ranks of one group.

    Buffers belong to the backend from the call until it returns. `send` and `recv` may be called
    from several threads at once, with different peers or tags. A `deadline` is an absolute
    `time.monotonic()` second; when it passes, the call raises `TimeoutError`.

    Attributes:
        rank: this process's rank in the group.
        world_size: number of ranks in the group.
        devices: where this one takes buffers; None for all that its `BackendInfo` says.
        streams: devices on which an operation is only launched when its method returns, and ends
            later, in the order of the device's own queue; see `launched`.
        labels_frames: True when the backend carries the label of the call under way (`self.call`)
            in its own frames and compares it; the default agreement is then left out where the
            frames of the collective itself reach every rank, and transfers need no label message.
    """

    devices: tuple[Device, ...] | None = None
    streams: tuple[Device, ...] = ()
    labels_frames = False

    def __init__(self, rank: int, world_size: int, choice: Choice | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.choice = choice or Choice()
        self.call = Call("barrier")
        self._senders: ThreadPoolExecutor | None = None
        self._senders_lock = threading.Lock()

    # -- what an author must write ---------------------------------------------------------------

    @abstractmethod
    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Send `buffer` to `peer`; return when the buffer may be used again.

        Messages to one peer with one tag arrive in order. Tags have up to 64 bits.
        """

    @abstractmethod
    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Receive the next message with this tag from `peer` into `buffer`, filling it.

        Messages with other tags that arrive first are kept for their own `recv`.
        """

    @abstractmethod
    def close(self) -> None:
        """Release everything. Idempotent; never blocks for long."""

    # -- what a backend may do better ------------------------------------------------------------

    def abort(self) -> None:
        """Wake every blocked call of this group, here and as far as possible on other ranks."""
        self.close()

    def allocate(self, nbytes: int) -> Array:
        """Return `nbytes` bytes (uint8) of the memory that this backend moves fastest."""
        return np.empty(nbytes, np.uint8)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Return the backend of a group of some of these ranks, of which this rank is one.

        Args:
            ranks: the members' ranks in this group, in the order of their new ranks.
            context: the new group's number, unique in the job.
        """
        from ferro.subgroup_backend import SubgroupBackend  # which inherits from this class

        return SubgroupBackend(self, ranks, context)

    def split(self, ranks: Sequence[int] | None, context: int) -> Backend | None:
        """Return the backend of one of the groups into which all ranks here part at once.

        As `subgroup`, for a library that makes groups only so: every rank of this group calls it,
        as a collective, those that are in no group with None for `ranks` (and get None).
        """
        return None if ranks is None else self.subgroup(ranks, context)

    def launched(self) -> Completion:
        """Return what tells the end of the operations that this thread launched last.

        Asked for after operations on one of the `streams`, in the thread that launched them.
        """
        raise UnsupportedError(f"{type(self).__name__} launches nothing")

    def shrink(self, ranks: Sequence[int], context: int) -> Backend:
        """Return the backend of those ranks that are left after this group died.

        Takes what `subgroup` takes. A backend whose connections between the living outlast the
        death of a group overrides this.
        """
        raise UnsupportedError(
            f"{type(self).__name__} cannot go on after a rank is lost: restart the job, for "
            "example with `ferro run --max-restarts`",
            op="shrink",
        )

    def exchange(
        self,
        sends: Sequence[tuple[int, Array]],
        recvs: Sequence[tuple[int, Array]],
        *,
        tag: int,
        deadline: float,
    ) -> None:
        """Do all these (peer, buffer) transfers at the same time; return when all are done.

        Messages between two ranks match in the order given. Never deadlocks, whatever the order
        in which the peers do theirs: every destination has a sending thread of its own.
        """
        by_peer: dict[int, list[Array]] = {}
        for peer, buffer in sends:
            by_peer.setdefault(peer, []).append(buffer)
        # Here, for it imports logging, and most backends have an exchange of their own.
        from concurrent.futures import ThreadPoolExecutor, wait

        with self._senders_lock:
            if self._senders is None:
                self._senders = ThreadPoolExecutor(_SENDERS, "ferro-send")

        def send_all(peer: int, buffers: Sequence[Array]) -> None:
            for buffer in buffers:
                self.send(buffer, peer, tag=tag, deadline=deadline)

        sending: list[Future[None]] = [
            self._senders.submit(send_all, peer, buffers) for peer, buffers in by_peer.items()
        ]
        try:
            for peer, buffer in recvs:
                self.recv(buffer, peer, tag=tag, deadline=deadline)
        finally:  # whatever comes of it, the buffers are the caller's again afterwards
            wait(sending, max(0.0, deadline - time.monotonic()))
        for future in sending:
            future.result(max(0.0, deadline - time.monotonic()))

    def agree(self, call: Call, *, deadline: float) -> None:
        """Begin a collective: make sure that every rank makes this call, before data moves.

        The default passes labels round in log2(n) rounds (the dissemination barrier), so that a
        rank returns only when all have come. A backend that labels its frames needs this for
        rooted calls of many ranks only: with few, all tell rank 0, which lets the root of a call
        that gives go on, and at the end (`_release`) all ranks of one that collects.

        Raises:
            CollectiveMismatch: another rank makes another call; says which.
        """
        self.call = call
        rooted = call.op in _GIVING or call.op in _COLLECTING
        few = self.world_size <= _STAR_RANKS
        if self.labels_frames and rooted and few:
            self._report(call, deadline)
        elif not self.labels_frames or (rooted and not few):
            mine = np.frombuffer(call.label(), np.uint8)
            theirs = np.empty(LABEL_BYTES, np.uint8)
            distance = 1
            while distance < self.world_size:
                to, source = (
                    (self.rank + distance) % self.world_size,
                    (self.rank - distance) % self.world_size,
                )
                self.exchange([(to, mine)], [(source, theirs)], tag=self.tag, deadline=deadline)
                if theirs.tobytes() != call.label():
                    raise mismatch(self.rank, call, source, theirs.tobytes())
                distance *= 2

    def _report(self, call: Call, deadline: float) -> None:
        """Show rank 0 an empty frame, and so the label, of every rank."""
        answered = call.op in _GIVING and call.root != 0
        if self.rank != 0:
            awaited = [(0, _NOTHING)] if answered and self.rank == call.root else []
            self.exchange([(0, _NOTHING)], awaited, tag=self.tag, deadline=deadline)
            return
        others = [(rank, _NOTHING) for rank in range(1, self.world_size)]
        self.exchange([], others, tag=self.tag, deadline=deadline)
        if answered:
            self.exchange([(call.root, _NOTHING)], [], tag=self.tag, deadline=deadline)

    def _release(self, deadline: float) -> None:
        """End a call that collects: nobody leaves before rank 0 has seen that all agree."""
        if not self.labels_frames or self.world_size > _STAR_RANKS:
            return
        others = [(rank, _NOTHING) for rank in range(1, self.world_size)]
        sends, recvs = (others, []) if self.rank == 0 else ([], [(0, _NOTHING)])
        self.exchange(sends, recvs, tag=self.tag, deadline=deadline)

    @property
    def tag(self) -> int:
        """The tag of the collective under way."""
        return collective_tag(self.call.seq)

    # -- the collectives, each a schedule by default ---------------------------------------------

    def barrier(self, *, deadline: float) -> None:
        """Return when every rank has called it."""
        if self.labels_frames:  # otherwise `agree` was a barrier already
            self._run("barrier", [], 0, deadline=deadline)

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """Reduce `buffer` over all ranks, in place, on all ranks."""
        self._run("all_reduce", buffer, buffer.nbytes, reduction=reduction, deadline=deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """Reduce `buffer` over all ranks, in place at `root`; elsewhere it is scratch."""
        self._run("reduce", buffer, buffer.nbytes, root, reduction=reduction, deadline=deadline)
        self._release(deadline)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """Fill `buffer` with the root's."""
        self._run("broadcast", buffer, buffer.nbytes, root, deadline=deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """Fill `buffer`, block by block of `counts` elements; this rank's is in its place."""
        self._run("all_gather", blocks(buffer, counts), buffer.nbytes, deadline=deadline)

    def gather(
        self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float
    ) -> None:
        """Collect every rank's `block` in `out` at the root; `out` is None elsewhere."""
        if out is not None:
            blocks(out, counts)[root][...] = block
        chunks = self._rooted_chunks(block, out, counts)
        self._run("gather", chunks, sum(counts) * block.itemsize, root, deadline=deadline)
        self._release(deadline)

    def scatter(
        self,
        block: Array,
        source: Array | None,
        counts: Sequence[int],
        root: int,
        *,
        deadline: float,
    ) -> None:
        """Fill `block` with this rank's part of the root's `source`, which is not changed."""
        chunks = self._rooted_chunks(block, source, counts)
        self._run("scatter", chunks, sum(counts) * block.itemsize, root, deadline=deadline)
        if source is not None:
            block[...] = blocks(source, counts)[root]

    def reduce_scatter(
        self,
        source: Array,
        out: Array,
        counts: Sequence[int],
        reduction: Reduction,
        *,
        deadline: float,
    ) -> None:
        """Reduce `source`, which is not changed; put this rank's block into `out`."""
        info = self.choice.algorithm(
            "reduce_scatter", self.world_size, source.nbytes, at_once=reduction.needs_all
        )
        schedule = build(info, self.rank, self.world_size, 0)
        written = {c for r in schedule.rounds for recv in r.recvs for c in recv.chunks}
        chunks = blocks(source, counts)
        for number in written - {self.rank}:
            chunks[number] = chunks[number].copy()
        out[...] = chunks[self.rank]
        chunks[self.rank] = out
        once = info.combines_once
        execution = Execution(schedule, chunks, self, reduction=reduction, at_once=once)
        execution.run(tag=self.tag, deadline=deadline)
        if not once:
            reduction.finish(out)

    def all_to_all(
        self,
        source: Array,
        out: Array,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        *,
        deadline: float,
    ) -> None:
        """Send block j of `source` to rank j; block i of `out` comes from rank i."""
        n, me = self.world_size, self.rank
        outgoing, incoming = blocks(source, send_counts), blocks(out, recv_counts)
        incoming[me][...] = outgoing[me]
        chunks: list[Array | None] = [None] * (n * n)
        for other in range(n):
            if other != me:
                chunks[me * n + other] = outgoing[other]
                chunks[other * n + me] = incoming[other]
        # Ranks may have different sizes here, so none of them may enter the choice.
        self._run("all_to_all", chunks, 0, deadline=deadline)

    # -- shared by the defaults ------------------------------------------------------------------

    def _run(
        self,
        collective: str,
        data: Array | Sequence[Array | None],
        nbytes: int,
        root: int = 0,
        *,
        reduction: Reduction | None = None,
        deadline: float,
    ) -> None:
        """Run the chosen schedule over ready chunks, or over a buffer cut into equal ones."""
        at_once = reduction is not None and reduction.needs_all
        info = self.choice.algorithm(collective, self.world_size, nbytes, at_once=at_once)
        schedule = build(info, self.rank, self.world_size, root)
        chunks = near_equal(data, schedule.chunks) if isinstance(data, np.ndarray) else data
        once = info.combines_once
        execution = Execution(schedule, chunks, self, reduction=reduction, at_once=once)
        execution.run(tag=self.tag, deadline=deadline)
        if reduction is not None and not once and isinstance(data, np.ndarray):
            reduction.finish(data)

    def _rooted_chunks(
        self, block: Array, whole: Array | None, counts: Sequence[int]
    ) -> Sequence[Array]:
        """Return all blocks; away from the root, other ranks' ones are memory to relay them."""
        if whole is not None:
            return blocks(whole, counts)
        empty = [np.empty(count, block.dtype) for count in counts]
        empty[self.rank] = block
        return empty


def mismatch(rank: int, mine: Call, peer: int, label: bytes) -> CollectiveMismatch:
    """Return the error for a label that differs from this rank's own call."""
    theirs = Call.from_label(label)
    if mine.op == "send":  # one label stands for both ends of a transfer; it was this one's
        mine = replace(mine, op="recv")
    return CollectiveMismatch(f"rank {rank} called {mine}; rank {peer} called {theirs}", peer=peer)
