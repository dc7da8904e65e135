"""HybridBackend: each operation goes to the backend for its array's device, or for transfers.

operation                array   goes to
collectives              CPU     collectives[cpu]; p2p where there is none
                         CUDA    collectives[cuda]
send, recv, exchange     CPU     p2p
                         CUDA    p2p, if it takes them; else collectives[cuda]
barrier                          p2p
memory                   CPU     collectives[cpu]
groups, abort, close             every part
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from ferro import Backend, Device
from ferro.arrays import device_of
from ferro.backend import Completion
from ferro.collectives.label import Call
from ferro.collectives.reduction import Reduction
from ferro.group.subgroups import split_backend, subgroup_backend
from ferro.types import Array

from .launches import Launches
from .routes import Routes
from .transfers import Transfers


class HybridBackend(Backend):
    """One rank of a group whose operations are shared out among several backends, its parts.

    A part is told of a collective only when it is to carry it out. What it compares has the
    group's number in it: ranks that come to one part with different calls of the group learn of
    it, even if these look alike. Ranks that wait for each other in different parts, for they pass
    arrays on different devices to one call, learn of it by the deadline.

    Args:
        collectives: what carries out collectives: a backend for each device; or just one, for the
            arrays for which it is. Those on the CPU are p2p's where none is given.
        p2p: what sends and receives, and carries out barriers; it takes arrays on the CPU.

    Raises:
        UsageError: the parts are of different groups, or do not take the arrays that they should.
    """

    def __init__(
        self, *, collectives: Backend | Mapping[Device, Backend] | Mapping[str, Backend], p2p: Backend
    ) -> None:
        super().__init__(p2p.rank, p2p.world_size, p2p.choice)
        self._routes = Routes.between(collectives, p2p)
        self._parts = self._routes.parts
        self._launches = Launches()
        self._transfers = Transfers(self._routes, self._launches)
        self._deadline = math.inf
        self._told = set(self._parts)  # of the call under way; there is none so far
        self.devices = tuple(self._routes.collectives)
        self.streams = self._routes.streams
        self.labels_frames = p2p.labels_frames

    @property
    def collectives(self) -> Mapping[Device, Backend]:
        """The backends that carry out collectives, by device."""
        return self._routes.collectives

    @property
    def p2p(self) -> Backend:
        """The backend for transfers and barriers."""
        return self._routes.p2p

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.send`."""
        self._transfers.send(buffer, peer, tag, deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.recv`."""
        self._transfers.recv(buffer, peer, tag, deadline)

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """See `Backend.exchange`."""
        self._transfers.exchange(sends, recvs, tag, deadline)

    def launched(self) -> Completion:
        """See `Backend.launched`: of the part that this thread gave something last."""
        return self._launches.completion()

    def agree(self, call: Call, *, deadline: float) -> None:
        """Begin a collective; the part that carries it out agrees on it when that is known."""
        self.call = call
        self._deadline = deadline
        self._told.clear()

    def barrier(self, *, deadline: float) -> None:
        """See `Backend.barrier`. It does not wait for what was launched on a device."""
        self._tell(self.p2p).barrier(deadline=deadline)

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        self._part(buffer).all_reduce(buffer, reduction, deadline=deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """See `Backend.reduce`."""
        self._part(buffer).reduce(buffer, reduction, root, deadline=deadline)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """See `Backend.broadcast`."""
        self._part(buffer).broadcast(buffer, root, deadline=deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """See `Backend.all_gather`."""
        self._part(buffer).all_gather(buffer, counts, deadline=deadline)

    def gather(self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.gather`."""
        self._part(block).gather(block, out, counts, root, deadline=deadline)

    def scatter(self, block: Array, source: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.scatter`. Away from the root blocks are on the CPU, whatever it has."""
        one = len(self.collectives) == 1
        part = self._part(block) if one else self._part_at(root, block, source)
        part.scatter(block, source, counts, root, deadline=deadline)

    def reduce_scatter(
        self, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, *, deadline: float
    ) -> None:
        """See `Backend.reduce_scatter`."""
        self._part(source).reduce_scatter(source, out, counts, reduction, deadline=deadline)

    def all_to_all(
        self, source: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, deadline: float
    ) -> None:
        """See `Backend.all_to_all`."""
        self._part(source).all_to_all(source, out, send_counts, recv_counts, deadline=deadline)

    def allocate(self, nbytes: int) -> Array:
        """Return memory that collectives on the CPU move fastest."""
        return self.collectives[Device.CPU].allocate(nbytes)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Return the group of every part's subgroup."""
        return self._of(lambda part: subgroup_backend(part, ranks, context))

    def split(self, ranks: Sequence[int] | None, context: int) -> Backend | None:
        """See `Backend.split`: every part splits, one after the other."""
        if ranks is None:
            for part in self._parts:
                split_backend(self._tell(part), None, context)
            return None

        def split_part(part: Backend) -> Backend:
            made = split_backend(self._tell(part), ranks, context)
            assert made is not None, "this rank is in a group"
            return made

        return self._of(split_part)

    def shrink(self, ranks: Sequence[int], context: int) -> Backend:
        """Return the group of the survivors in every part.

        Raises:
            UnsupportedError: a part cannot go on after a rank is lost.
        """
        return self._of(lambda part: part.shrink(ranks, context))

    def abort(self) -> None:
        """Abort every part, also when one cannot."""
        with ExitStack() as parts:
            for part in self._parts:
                parts.callback(part.abort)

    def close(self) -> None:
        """Close every part, also when one cannot."""
        with ExitStack() as parts:
            for part in self._parts:
                parts.callback(part.close)

    def _part(self, buffer: Array) -> Backend:
        """Return the part for a collective on this array, which all ranks have agreed on there."""
        device = device_of(buffer)
        part = self.collectives[device]
        self._launches.note(part, device)
        return self._tell(part)

    def _part_at(self, root: int, block: Array, source: Array | None) -> Backend:
        """Return the part for the root's array; where that is, it tells the others in a byte."""
        devices, told = tuple(self.collectives), np.zeros(1, np.uint8)
        if source is not None:
            told[0] = devices.index(device_of(source))
        cpu = self._tell(self.collectives[Device.CPU])
        cpu.broadcast(told, root, deadline=self._deadline)
        part = self.collectives[devices[told[0]]]
        self._launches.note(part, device_of(block))
        return self._tell(part)

    def _tell(self, part: Backend) -> Backend:
        """Let a part agree on the call under way, once, and return it."""
        if part not in self._told:
            self._told.add(part)
            part.agree(_marked(self.call), deadline=self._deadline)
        return part

    def _of(self, make: Callable[[Backend], Backend]) -> HybridBackend:
        """Return a backend with the same routes, of what is made of each part."""
        made: dict[Backend, Backend] = {}
        with ExitStack() as undo:
            for part in self._parts:
                made[part] = make(part)
                undo.callback(made[part].close)
            by_device = {device: made[part] for device, part in self.collectives.items()}
            group = HybridBackend(collectives=by_device, p2p=made[self.p2p])
            undo.pop_all()
        return group


def _marked(call: Call) -> Call:
    """Return a call with its number among what the ranks compare."""
    detail = f"#{call.seq} {call.detail}".rstrip()
    return Call(call.op, call.seq, call.dtype, call.count, call.reduction, call.root, detail)
