"""RootedSetup: the ranks of a group set up a persistent rooted collective together.

All ranks tell each other whether they can run it in shared memory, and the root tells where the area is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np

from ferro.collectives.fast_path import EvenCollective, Turn
from ferro.types import Array
from ferro_gloo.shm.arena import ArenaSpan
from ferro_gloo.shm.bootstrap import bootstrap_all_gather
from ferro_gloo.shm.exchange.memory import ExchangeMemory
from ferro_gloo.shm.kernels import has_arithmetic
from ferro_gloo.shm.native import NATIVE, OPERATIONS
from ferro_gloo.shm.region import ShmRegion
from ferro_gloo.shm.rooted.area import depth_for
from ferro_gloo.shm.rooted.collective import ShmRootedCollective, keep_area
from ferro_gloo.shm.rooted.native_steps import RootedSteps
from ferro_gloo.shm.rooted.waiting import LateSteps
from ferro_gloo.shm.slot_ring import SlotRing
from ferro_gloo.tcp.backend import TcpBackend

_TAG = 1 << 36  # a bit above every user's tag, and above those of `TcpBackend` and of the exchanges
_ANSWER = struct.Struct("<?qq")  # whether the rank can run it; at the root, where the area is, and its size
_NOWHERE = ArenaSpan(0, 0)
_FROM_ROOT = ("broadcast", "scatter")


class RootedSetup:
    """Sets up the persistent rooted collectives of one group; all its ranks share a region.

    Args:
        region: the memory of its other collectives.
        ring: the slots in it.
        tcp: the same ranks over TCP.
        memory: of this process, for the areas.
    """

    def __init__(self, region: ShmRegion, ring: SlotRing, tcp: TcpBackend, memory: ExchangeMemory) -> None:
        self._region = region
        self._ring = ring
        self._tcp = tcp
        self._memory = memory

    def make(
        self,
        collective: EvenCollective | None,
        buffers: Sequence[Array | None],
        turn: Turn,
        *,
        number: int,
        deadline: float,
    ) -> ShmRootedCollective | None:
        """Set up a collective; every rank of the group calls it, see `Backend.persistent_collective`.

        Return None, on all ranks, where one of them cannot run it.
        """
        tcp, memory = self._tcp, self._memory
        steps, late, depth, root = None, None, 0, -1
        if collective is not None:
            root = collective.root
            late = LateSteps(collective.call, turn, self._ring, tcp, memory, self._region.counters.patience())
            blocks = tcp.world_size if collective.op == "scatter" else 1
            depth = depth_for(blocks * collective.count * collective.dtype.itemsize)
            steps = self._make_steps(collective, buffers, turn, late, number) if depth else None
        area, span = None, None
        if steps is not None and tcp.rank == root:
            area = memory.allocate(steps.area_bytes(depth))
            span = memory.arenas.span_of(area)  # None where the arena is full
        others = [rank for rank in range(tcp.world_size) if rank != root]
        able = steps is not None and (area is None or span is not None)
        try:
            answer = _ANSWER.pack(able, *(span or _NOWHERE))
            raw = bootstrap_all_gather(tcp, answer, deadline, _TAG | number)
        except BaseException:
            if area is not None:
                keep_area(memory, area, others)  # another rank may have learnt where it is
            raise
        answers = [_ANSWER.unpack(one) for one in raw]
        if collective is None or steps is None or late is None or not all(is_able for is_able, *_ in answers):
            return None
        place = ArenaSpan(*answers[root][1:])
        steps.open(memory.arenas.view(tcp.ranks[root], place) if area is None else area, depth)
        writes = (tcp.rank == root) == (collective.op in _FROM_ROOT)
        return ShmRootedCollective(steps, late, writes=writes, memory=memory, area=area, others=others)

    def _make_steps(
        self,
        collective: EvenCollective,
        buffers: Sequence[Array | None],
        turn: Turn,
        late: Callable[[RootedSteps], None],
        number: int,
    ) -> RootedSteps | None:
        """Hold this rank's arrays; return None where the native helper cannot use them, or has no such reduction."""
        ring, reduction = self._region.native_ring, collective.reduction
        nbytes = collective.count * collective.dtype.itemsize
        if NATIVE is None or ring is None or nbytes == 0:
            return None
        if reduction is not None and not has_arithmetic(reduction):
            return None
        try:
            return NATIVE.RootedSteps(
                ring=ring,
                operation=OPERATIONS.index(collective.op),
                dtype=collective.dtype.name,
                reduction="" if reduction is None else reduction.name,
                block_bytes=nbytes,
                root=collective.root,
                source=buffers[0],
                target=buffers[1],
                state=turn.state,
                late=late,
                sample=np.empty((2, 3), collective.dtype),
                number=number,
            )
        except ValueError:
            return None
