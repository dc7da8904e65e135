"""HybridBackend: passes each operation to the part for its array's device, or for transfers.

operation                  array   part
collectives                CPU     collectives[cpu]; p2p where there is none
                           CUDA    collectives[cuda]
send, recv, exchange       CPU     p2p
                           CUDA    p2p, if it supports the device; else collectives[cuda]
barrier                            p2p
allocate                   CPU     collectives[cpu]
subgroup, split, shrink            every part
abort, close                       every part
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
from ferro.collectives.posted_transfers import PostedTransfers
from ferro.collectives.reduction import Reduction
from ferro.group.subgroups import split_backend, subgroup_backend
from ferro.types import Array

from .routes import Routes
from .transfers import LastLaunch, Transfers


class HybridBackend(Backend):
    """One rank of a group whose operations are divided among several backends, its parts.

    The ranks agree on a collective only in the part that carries it out. The calls that they compare there contain the
    group's sequence number: ranks that reach a part with different calls of the group raise `CollectiveMismatch`, even
    if the calls look alike. Ranks that pass arrays on different devices to one call wait for each other in different
    parts, and raise `CollectiveTimeout` at the deadline.

    Args:
        collectives: the parts that carry out collectives, by device; or one part, for the devices that it supports.
            Without a part for the CPU, `p2p` carries out the collectives of arrays there.
        p2p: the part that sends and receives, and carries out barriers; it supports arrays on the CPU.

    Raises:
        UsageError: the parts are of different groups, or a part does not support its device.
    """

    def __init__(
        self, *, collectives: Backend | Mapping[Device, Backend] | Mapping[str, Backend], p2p: Backend
    ) -> None:
        super().__init__(p2p.rank, p2p.world_size, p2p.choice)
        self._routes = Routes.from_parts(collectives, p2p)
        self._parts = self._routes.parts
        self._last_launch = LastLaunch()
        self._transfers = Transfers(self._routes, self._last_launch)
        self._deadline = math.inf
        self._agreed = set(self._parts)  # parts that need not agree on the current call (before any call, all parts)
        self.devices = tuple(self._routes.collectives)
        self.streams = self._routes.streams
        self.labels_frames = p2p.labels_frames

    @property
    def collectives(self) -> Mapping[Device, Backend]:
        """The parts that carry out collectives, by device."""
        return self._routes.collectives

    @property
    def p2p(self) -> Backend:
        """The part for transfers and barriers."""
        return self._routes.p2p

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Send through the part for the array's device."""
        self._transfers.send(buffer, peer, tag, deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Receive through the part for the array's device."""
        self._transfers.recv(buffer, peer, tag, deadline)

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """Exchange through the parts for the arrays' devices."""
        self._transfers.exchange(sends, recvs, tag, deadline)

    def posted_transfers(self) -> PostedTransfers:
        """Post through `p2p` where it transfers all arrays; else each outstanding transfer takes a thread."""
        alone = all(part is self.p2p for part in self._routes.transfers.values())
        return self.p2p.posted_transfers() if alone else super().posted_transfers()

    def launched(self) -> Completion:
        """Return the completion of the operation that this thread last gave to a part."""
        return self._last_launch.completion()

    def agree(self, call: Call, *, deadline: float) -> None:
        """Begin a collective; the part that will carry it out agrees on it later, when the array is known."""
        self.call = call
        self._deadline = deadline
        self._agreed.clear()

    def barrier(self, *, deadline: float) -> None:
        """Wait until every rank has called it, but not for operations launched on a device."""
        self._agree_in(self.p2p).barrier(deadline=deadline)

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """Reduce in the part for the array's device."""
        self._part(buffer).all_reduce(buffer, reduction, deadline=deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """Reduce in the part for the array's device."""
        self._part(buffer).reduce(buffer, reduction, root, deadline=deadline)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """Broadcast in the part for the array's device."""
        self._part(buffer).broadcast(buffer, root, deadline=deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """Gather in the part for the array's device."""
        self._part(buffer).all_gather(buffer, counts, deadline=deadline)

    def gather(self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """Gather in the part for the block's device."""
        self._part(block).gather(block, out, counts, root, deadline=deadline)

    def scatter(self, block: Array, source: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """Scatter in the part for the root's array: the other ranks' blocks are on the CPU even if it is not."""
        single = len(self.collectives) == 1
        part = self._part(block) if single else self._part_of_root(root, block, source)
        part.scatter(block, source, counts, root, deadline=deadline)

    def reduce_scatter(
        self, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, *, deadline: float
    ) -> None:
        """Reduce in the part for the source's device."""
        self._part(source).reduce_scatter(source, out, counts, reduction, deadline=deadline)

    def all_to_all(
        self, source: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, deadline: float
    ) -> None:
        """Exchange blocks in the part for the source's device."""
        self._part(source).all_to_all(source, out, send_counts, recv_counts, deadline=deadline)

    def allocate(self, nbytes: int) -> Array:
        """Allocate memory that collectives on the CPU move fastest."""
        return self.collectives[Device.CPU].allocate(nbytes)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Make a hybrid backend of every part's subgroup."""
        return self._map_parts(lambda part: subgroup_backend(part, ranks, context))

    def split(self, ranks: Sequence[int] | None, context: int) -> Backend | None:
        """Split every part, one after the other."""
        if ranks is None:
            for part in self._parts:
                split_backend(self._agree_in(part), None, context)
            return None

        def split_part(part: Backend) -> Backend:
            made = split_backend(self._agree_in(part), ranks, context)
            assert made is not None, "this rank is in a group"
            return made

        return self._map_parts(split_part)

    def shrink(self, ranks: Sequence[int], context: int) -> Backend:
        """Make a hybrid backend of the survivors in every part.

        Raises:
            UnsupportedError: a part cannot go on after a rank is lost.
        """
        return self._map_parts(lambda part: part.shrink(ranks, context))

    def abort(self) -> None:
        """Abort every part, even if one raises."""
        with ExitStack() as parts:
            for part in self._parts:
                parts.callback(part.abort)

    def close(self) -> None:
        """Close every part, even if one raises."""
        with ExitStack() as parts:
            for part in self._parts:
                parts.callback(part.close)

    def _part(self, buffer: Array) -> Backend:
        """Choose the part for a collective on this array, and let the ranks agree on the call there."""
        device = device_of(buffer)
        part = self.collectives[device]
        self._last_launch.record(part, device)
        return self._agree_in(part)

    def _part_of_root(self, root: int, block: Array, source: Array | None) -> Backend:
        """Choose the part for the root's array; the root broadcasts the index of its array's device."""
        devices, index = tuple(self.collectives), np.zeros(1, np.uint8)
        if source is not None:
            index[0] = devices.index(device_of(source))
        cpu = self._agree_in(self.collectives[Device.CPU])
        cpu.broadcast(index, root, deadline=self._deadline)
        part = self.collectives[devices[index[0]]]
        self._last_launch.record(part, device_of(block))
        return self._agree_in(part)

    def _agree_in(self, part: Backend) -> Backend:
        """Let the ranks agree on the current call in a part, once per call, and return the part."""
        if part not in self._agreed:
            self._agreed.add(part)
            part.agree(_with_sequence_number(self.call), deadline=self._deadline)
        return part

    def _map_parts(self, make: Callable[[Backend], Backend]) -> HybridBackend:
        """Make a hybrid backend with the same routes from a new backend for each part."""
        made: dict[Backend, Backend] = {}
        with ExitStack() as undo:
            for part in self._parts:
                made[part] = make(part)
                undo.callback(made[part].close)
            by_device = {device: made[part] for device, part in self.collectives.items()}
            group = HybridBackend(collectives=by_device, p2p=made[self.p2p])
            undo.pop_all()
        return group


def _with_sequence_number(call: Call) -> Call:
    """Add the call's number in the group to the detail that ranks compare."""
    detail = f"#{call.seq} {call.detail}".rstrip()
    return Call(call.op, call.seq, call.dtype, call.count, call.reduction, call.root, detail)
