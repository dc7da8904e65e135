"""ShmBackend: the collectives of ranks on one host, through shared memory.

All reductions are in order of rank, so results have the same bits on every rank, with and without `deterministic=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ferro.backend import Backend
from ferro.collectives.fast_path import EvenCollective, FastPath, FastScatter, Turn
from ferro.collectives.label import Call
from ferro.collectives.partition import blocks
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm import data_movement, reductions
from ferro_gloo.shm.chunked import ChunkedRunner
from ferro_gloo.shm.chunked_operation import ChunkedOperation
from ferro_gloo.shm.exchange.memory import ExchangeMemory
from ferro_gloo.shm.kernels import has_arithmetic
from ferro_gloo.shm.large_path import LargePath
from ferro_gloo.shm.mapping import is_used_by_other_threads
from ferro_gloo.shm.native import NATIVE, OPERATIONS
from ferro_gloo.shm.region import ShmRegion
from ferro_gloo.shm.rooted.collective import ShmRootedCollective
from ferro_gloo.shm.rooted.setup import RootedSetup
from ferro_gloo.shm.single_round import SingleRoundCollectives
from ferro_gloo.shm.slot_ring import SlotRing
from ferro_gloo.tcp.backend import TcpBackend

# If all ranks' arrays together have at most this many bytes, each rank reduces all of them, in one round. Otherwise
# each rank reduces its part and publishes the result, in two rounds. Measured with 4 ranks on 2 cores: 256 KiB take 72
# us in one round, 100 in two.
_EACH_REDUCES_BYTES = 1 << 20
# In these a rank's message, or the whole result, has the size of one block, and n blocks in the others.
_ONE_BLOCK = ("barrier", "all_reduce", "reduce", "broadcast", "gather")


class ShmBackend(Backend):
    """One rank of a group whose ranks share a region.

    Args:
        region: the memory.
        tcp: the same ranks over TCP, for transfers, and to notice the loss of a rank.
        memory: of this process's persistent exchanges, with the arrays that can be used in place.
    """

    labels_frames = True

    def __init__(self, region: ShmRegion, tcp: TcpBackend, memory: ExchangeMemory) -> None:
        super().__init__(tcp.rank, tcp.world_size, tcp.choice)
        self._tcp = tcp
        self._region = region
        self._ring = SlotRing(region, tcp)
        self._runner = ChunkedRunner(region, self._ring, tcp, memory.arenas)
        self._rooted = RootedSetup(region, self._ring, tcp, memory)
        self._single_round = SingleRoundCollectives(region, self._ring, tcp.rank)
        self._slot_bytes = region.slot_bytes
        self._single_round_bytes = min(region.slot_bytes, _EACH_REDUCES_BYTES // tcp.world_size)

    def begin(self, call: Call) -> None:
        """Begin a collective, whose first chunk carries this call's label."""
        self.call = call
        self._ring.set_call(call)

    def agree(self, call: Call, *, deadline: float) -> None:
        """See `Backend.agree`; the first round of an operation compares labels."""
        self.call = call
        self._ring.set_call(call)

    def fast_path(self, collective: EvenCollective, turn: Turn) -> FastPath | None:
        """See `Backend.fast_path`: there is one for what the native helper can reduce."""
        ring, reduction, op = self._region.native_ring, collective.reduction, collective.op
        block = 0 if op == "barrier" else collective.count * collective.dtype.itemsize
        message = block if op in _ONE_BLOCK else self.world_size * block
        limit = self._single_round_bytes if op == "all_reduce" else self._slot_bytes
        if NATIVE is None or ring is None or (reduction is not None and not has_arithmetic(reduction)):
            return None
        if message > limit:
            return LargePath(self._runner, self._ring, collective, turn)
        return NATIVE.ShortPath(
            ring=ring,
            operation=OPERATIONS.index(op),
            dtype=collective.dtype.name,
            reduction="" if reduction is None else reduction.name,
            block_bytes=block,
            root=collective.root,
            label=collective.call.label(),
            lock=turn.lock,
            pending=turn.pending,
            state=turn.state,
            late=partial(_wait_late, self._ring, collective.call, turn.late),
            sample=np.empty((2, 3), collective.dtype),
        )

    def persistent_collective(
        self,
        collective: EvenCollective | None,
        buffers: Sequence[Array | None],
        turn: Turn,
        *,
        number: int,
        deadline: float,
    ) -> ShmRootedCollective | None:
        """See `Backend.persistent_collective`: there is one where the ranks run ahead of each other."""
        return self._rooted.make(collective, buffers, turn, number=number, deadline=deadline)

    def fast_scatter(self, header: EvenCollective, told: bytes, data: EvenCollective, turn: Turn) -> FastScatter | None:
        """See `Backend.fast_scatter`: a small one is one call of the native helper."""
        move = self.fast_path(data, turn)
        if NATIVE is None or move is None or isinstance(move, LargePath):
            return super().fast_scatter(header, told, data, turn)
        return NATIVE.AnnouncedScatter(tell=self.fast_path(header, turn), blocks=move, header=told)

    def barrier(self, *, deadline: float) -> None:
        """See `Backend.barrier`."""
        self._single_round.barrier(deadline)

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        if not buffer.flags.aligned:  # the native helper, which chooses the bits, takes aligned numbers only
            aligned = buffer.copy()
            self.all_reduce(aligned, reduction, deadline=deadline)
            buffer[...] = aligned
        elif buffer.nbytes <= self._single_round_bytes:
            self._single_round.all_reduce(buffer, reduction, deadline)
        else:
            make = partial(reductions.all_reduce, self._runner, buffer, buffer, reduction)
            self._runner.run_even(buffer, buffer, make, deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """See `Backend.reduce`."""
        if not buffer.flags.aligned:
            aligned = buffer.copy()
            self.reduce(aligned, reduction, root, deadline=deadline)
            if self.rank == root:
                buffer[...] = aligned
        elif buffer.nbytes <= self._slot_bytes:
            self._single_round.reduce(buffer, reduction, root, deadline)
        else:
            out = buffer if self.rank == root else None
            make = partial(reductions.reduce, self._runner, buffer, out, reduction)
            self._runner.run_even(buffer, out, make, deadline)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """See `Backend.broadcast`."""
        if buffer.nbytes <= self._slot_bytes:
            self._single_round.broadcast(buffer, root, deadline)
        else:
            source, out = (buffer, None) if self.rank == root else (None, buffer)
            make = partial(data_movement.broadcast, self._runner, source, out, root)
            self._runner.run_even(source, out, make, deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """See `Backend.all_gather`."""
        if buffer.nbytes <= self._slot_bytes and _are_even(counts):
            self._single_round.all_gather(buffer, deadline)
        else:
            block = blocks(buffer, counts)[self.rank]
            self._run(
                block, buffer, partial(data_movement.all_gather, self._runner, block, buffer, counts), counts, deadline
            )

    def gather(self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.gather`."""
        if block.nbytes <= self._slot_bytes and _are_even(counts):
            self._single_round.gather(block, out, deadline)
        else:
            self._run(
                block, out, partial(data_movement.gather, self._runner, block, out, counts, root), counts, deadline
            )

    def scatter(self, block: Array, source: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.scatter`."""
        if sum(counts) * block.itemsize <= self._slot_bytes and _are_even(counts):
            self._single_round.scatter(block, source, root, deadline)
        else:
            self._run(
                source,
                block,
                partial(data_movement.scatter, self._runner, block, source, counts, root),
                counts,
                deadline,
            )

    def reduce_scatter(
        self, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, *, deadline: float
    ) -> None:
        """See `Backend.reduce_scatter`."""
        if not (source.flags.aligned and out.flags.aligned):
            aligned = np.empty_like(out)
            self.reduce_scatter(source.copy(), aligned, counts, reduction, deadline=deadline)
            out[...] = aligned
        elif source.nbytes <= self._slot_bytes and _are_even(counts):
            self._single_round.reduce_scatter(source, out, reduction, deadline)
        else:
            make = partial(reductions.reduce_scatter, self._runner, source, out, counts, reduction)
            self._run(source, out, make, counts, deadline)

    def all_to_all(
        self, source: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, deadline: float
    ) -> None:
        """See `Backend.all_to_all`."""
        small = source.nbytes <= self._slot_bytes and _are_even([*send_counts, *recv_counts])
        if not (small and self._single_round.all_to_all(source, out, deadline)):
            operation = data_movement.all_to_all(
                self._runner, source, out, send_counts, recv_counts, synchronized=small
            )
            self._runner.run(operation, deadline)

    def _run(
        self,
        source: Array | None,
        target: Array | None,
        make: Callable[[], ChunkedOperation],
        counts: Sequence[int],
        deadline: float,
    ) -> None:
        """Run a collective of large or uneven blocks; the label of an even one says all about its sizes."""
        if _are_even(counts):
            self._runner.run_even(source, target, make, deadline)
        else:
            self._runner.run(make(), deadline)

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.send`; over TCP."""
        self._tcp.send(buffer, peer, tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.recv`; over TCP."""
        self._tcp.recv(buffer, peer, tag=tag, deadline=deadline)

    def abort(self) -> None:
        """See `Backend.abort`."""
        self._ring.retract()
        self._tcp.abort()

    def close(self) -> None:
        """Give the memory back, or, while another thread is in a collective, when no object refers to it."""
        if not is_used_by_other_threads():
            self._region.close()


def _are_even(counts: Sequence[int]) -> bool:
    return counts.count(counts[0]) == len(counts)


def _wait_late(
    ring: SlotRing, call: Call, late: Callable[[Call, Callable[..., None]], None], number: int, awaited: int
) -> None:
    """Wait for late ranks in a call on the short path, whose first chunk has this number; see `SlotRing.complete`."""
    late(call, partial(ring.complete, call, number, awaited))
