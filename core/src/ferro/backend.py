"""Backend: the contract that a communication backend implements.

An author writes `send`, `recv` and `close`. Every other method has a default that is built on those three, and a
backend overrides it where its library does better. `ProcessGroup` checks each call first, so a backend sees only
one-dimensional contiguous buffers of a dtype and device that it declared, and never a user's array.

A backend raises `TimeoutError` when a deadline passes, `GroupClosed` after `abort` (both `errors.with_awaited` ranks),
`PeerLost(peer=…)` when a rank is gone, `CollectiveMismatch` when labels differ. The group tells the other ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ferro.collectives import defaults
from ferro.collectives.choice import Choice
from ferro.collectives.fast_path import FastPaths
from ferro.collectives.label import Call, collective_tag
from ferro.collectives.posted_transfers import PostedTransfers, ThreadedTransfers
from ferro.collectives.reduction import Reduction
from ferro.errors import UnsupportedError
from ferro.types import Array, Device


class Completion(Protocol):
    """A handle on operations that were launched on a device's queue."""

    def done(self) -> bool:
        """Say whether the operations have ended. Never blocks."""

    def wait(self) -> None:
        """Order this thread's next operations on the device after these; raise their failure.

        The device's queue may wait instead of the thread.
        """


class Backend(FastPaths, ABC):
    """Moves buffers between the ranks of one group.

    A buffer belongs to the backend until the call returns. `send` and `recv` may be called from several threads at
    once, with different peers or tags. A `deadline` is an absolute `time.monotonic()` second.

    Attributes:
        rank: this process's rank in the group.
        world_size: number of ranks in the group.
        choice: the rules by which the defaults choose an algorithm; `choice.deterministic` binds overrides, too.
        call: the collective that is under way, as every rank must call it.
        devices: the devices whose buffers this backend takes; None for all that its `BackendInfo` names.
        streams: the devices on which a method only launches its operation before it returns. The operation ends later,
            in the order of the device's own queue; see `launched`.
        labels_frames: True when the backend carries the label of the current call (`self.call`) in its own frames and
            compares it. The default agreement is then left out where the frames of the collective itself reach every
            rank, and transfers need no label message.
    """

    devices: tuple[Device, ...] | None = None
    streams: tuple[Device, ...] = ()
    labels_frames = False

    def __init__(self, rank: int, world_size: int, choice: Choice | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.choice = choice or Choice()
        self.call = Call("barrier")
        self._sender_threads = defaults.SenderThreads()

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

    # -- methods that a backend overrides where its library does better ----------------------------

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """Do all these (peer, buffer) transfers at the same time; return when all are done.

        Messages between two ranks match in the order given. Never deadlocks, whatever the order of the peers' calls.
        """
        self._sender_threads.exchange(self, sends, recvs, tag=tag, deadline=deadline)

    def posted_transfers(self) -> PostedTransfers:
        """Make the means to have many transfers outstanding at once; the default takes a thread for each."""
        return ThreadedTransfers(self)

    def agree(self, call: Call, *, deadline: float) -> None:
        """Begin a collective: make sure that every rank makes this call, or raise CollectiveMismatch, naming two."""
        self.call = call
        defaults.agree(self, call, deadline)

    def abort(self) -> None:
        """Wake every blocked call of this group, here and as far as possible on other ranks."""
        self.close()

    def allocate(self, nbytes: int) -> Array:
        """Allocate `nbytes` bytes (uint8) of the memory that this backend moves fastest."""
        return np.empty(nbytes, np.uint8)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend | None:
        """Make the backend of a group of some of these ranks, of which this rank is one.

        The default returns None: ferro makes a `SubgroupBackend`, which moves everything through this backend.

        Args:
            ranks: the members' ranks in this group, in the order of their new ranks.
            context: the new group's number, unique in the job.
        """
        return None

    def split(self, ranks: Sequence[int] | None, context: int) -> Backend | None:
        """Make the backends of all the groups into which this group is split, where a library makes them only together.

        Every rank calls it as a collective; one that joins no group gives None for `ranks`, and gets None.
        """
        return None if ranks is None else self.subgroup(ranks, context)

    def shrink(self, ranks: Sequence[int], context: int) -> Backend:
        """Make the backend of the ranks that survive after this group died; the arguments are those of `subgroup`.

        A backend whose connections between the survivors outlast the death of a group overrides this.
        """
        remedy = "restart the job, for example with `ferro run --max-restarts`"
        raise UnsupportedError(f"{type(self).__name__} cannot go on after a rank is lost: {remedy}", op="shrink")

    def launched(self) -> Completion:
        """Make a handle on the operation that this thread launched last on one of the `streams`."""
        raise UnsupportedError(f"{type(self).__name__} launches nothing")

    @property
    def tag(self) -> int:
        """The tag of the collective that is under way."""
        return collective_tag(self.call.seq)

    # -- the collectives; the default of each runs a schedule --------------------------------------

    def barrier(self, *, deadline: float) -> None:
        """Wait until every rank has called it."""
        defaults.barrier(self, deadline)

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """Reduce `buffer` over all ranks, in place, on all ranks."""
        defaults.all_reduce(self, buffer, reduction, deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """Reduce `buffer` over all ranks, in place at `root`; on other ranks `buffer` is scratch memory."""
        defaults.reduce(self, buffer, reduction, root, deadline)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """Copy the root's `buffer` into `buffer` on every rank."""
        defaults.broadcast(self, buffer, root, deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """Fill `buffer`, block by block of `counts` elements; this rank's block is in it already."""
        defaults.all_gather(self, buffer, counts, deadline)

    def gather(self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """Collect every rank's `block` in `out` at the root; `out` is None elsewhere."""
        defaults.gather(self, block, out, counts, root, deadline)

    def scatter(self, block: Array, source: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """Fill `block` with this rank's part of the root's `source`, which is not changed."""
        defaults.scatter(self, block, source, counts, root, deadline)

    def reduce_scatter(
        self, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, *, deadline: float
    ) -> None:
        """Reduce `source`, which is not changed; put this rank's block into `out`."""
        defaults.reduce_scatter(self, source, out, counts, reduction, deadline)

    def all_to_all(
        self, source: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, deadline: float
    ) -> None:
        """Send block j of `source` to rank j; block i of `out` comes from rank i."""
        defaults.all_to_all(self, source, out, send_counts, recv_counts, deadline)
