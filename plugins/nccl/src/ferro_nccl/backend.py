"""NcclBackend: a group's collectives on CuPy arrays, launched on a stream of its own.

Host arrays (core's small control messages are such) are staged through the GPU, and waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from ferro.arrays import name_of
from ferro.backend import Backend, Completion
from ferro.collectives.label import LABEL_BYTES, Call, is_collective, mismatch
from ferro.collectives.reduction import Reduction
from ferro.errors import UnsupportedError, UsageError
from ferro.hookspecs import BackendConfig
from ferro.types import Array, Device
from ferro_nccl.codes import BYTE, Native, RedOp, native
from ferro_nccl.library import Communicator, Library
from ferro_nccl.meeting import Meeting
from ferro_nccl.moves import Moves, Span, cut
from ferro_nccl.place import Place
from ferro_nccl.placement import choose_gpu
from ferro_nccl.queue import Queue
from ferro_nccl.settings import Settings
from ferro_nccl.staging import Stage
from ferro_nccl.steps import GpuSteps, HostSteps

_WORLD = 0  # the world's context; those of other groups count from 1
_PATIENCE_S = 5.0  # how long close() waits for what was launched
_FLAG = Native(BYTE, int(RedOp.MAX))


class NcclBackend(Backend):
    """One rank of a group.

    Operations on arrays of the GPU are only launched: on a stream of this group's own, after what
    the caller's current stream holds, and what waits for the `Work` comes after them.

    Args:
        place: what this process's groups share.
        communicator: this rank's end.
        rank: this rank.
        members: the ranks in the world of all, by rank in this group.
        context: the group's number.
    """

    streams = (Device.CUDA,)
    # There are no labels: comparing calls would make the host wait for the GPU in each.
    labels_frames = True

    def __init__(
        self,
        place: Place,
        communicator: Communicator,
        rank: int,
        members: Sequence[int],
        context: int,
    ) -> None:
        world_size = len(members)
        super().__init__(rank, world_size, place.choice)
        self._place = place
        self._members = tuple(members)
        self._gpu = place.gpu
        lost = partial(place.lost_of, self._members)
        self._queue = Queue(place.gpu, communicator, place.part(context), lost, f"rank {rank}")
        self._moves = Moves(
            place.library, place.gpu, communicator, self._queue.stream, rank, world_size
        )
        with self._gpu.current(), self._queue.stream:
            self._flag = self._gpu.empty(1, np.dtype(np.uint8))

    @classmethod
    def connect(cls, config: BackendConfig, library: Library) -> NcclBackend:
        """Take a GPU, make it this thread's, connect to all other ranks; every rank does.

        Raises:
            UsageError: there is no such option.
            BackendUnavailable: there is no GPU for this rank, or ranks do not go together.
            RendezvousError: a rank did not come.
        """
        settings = Settings.read(config.options)
        if config.choice.fixed:
            raise UsageError("nccl chooses its algorithms itself: leave algorithms= out")
        index = choose_gpu(library.device_count(), config.local_rank, settings.device)
        gpu = library.gpu(index)
        gpu.use()  # the arrays that the program makes from here on are this group's
        place = Place(
            library=library,
            gpu=gpu,
            store=config.store,
            choice=config.choice,
            settings=settings,
            timeout_s=config.timeout_s,
            lost=config.lost,
        )
        communicator = place.connect(config.rank, config.world_size, _WORLD)
        return cls(place, communicator, config.rank, range(config.world_size), _WORLD)

    # -- calls and groups ------------------------------------------------------------------------

    def agree(self, call: Call, *, deadline: float) -> None:
        """Compare the ranks' calls where the user asked for it; see `Settings.check_calls`."""
        self.call = call
        if not self._place.settings.check_calls:
            return
        labels = np.empty((self.world_size, LABEL_BYTES), np.uint8)
        labels[self.rank] = np.frombuffer(call.label(), np.uint8)
        counts = (LABEL_BYTES,) * self.world_size
        self.all_gather(labels.reshape(-1), counts, deadline=deadline)
        for rank, label in enumerate(labels):
            if label.tobytes() != call.label():
                raise mismatch(self.rank, call, rank, label.tobytes())

    def launched(self) -> Completion:
        """See `Backend.launched`."""
        return self._queue.last

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Return a group with a communicator of its own; its members alone call it."""
        rank, size = ranks.index(self.rank), len(ranks)
        communicator = self._place.connect(rank, size, context)
        return self._part(communicator, ranks, context)

    def split(self, ranks: Sequence[int] | None, context: int) -> Backend | None:
        """Return one of the groups into which all ranks part; see `ncclCommSplit`."""
        deadline = time.monotonic() + self._place.timeout_s
        if ranks is None:
            self._queue.split(-1, 0, deadline)
            return None
        communicator = self._queue.split(ranks[0], ranks.index(self.rank), deadline)
        assert communicator is not None, "a rank with a color is in a group"
        return self._part(communicator, ranks, context)

    def abort(self) -> None:
        """End all that is under way, here at once and on the other ranks within about a second."""
        self._queue.abort()

    def close(self) -> None:
        """Let what was launched end, for a few seconds at most; then release the communicator."""
        self._queue.close(time.monotonic() + _PATIENCE_S)

    # -- transfers -------------------------------------------------------------------------------

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.send`; what this rank launches next waits until it is received."""
        self.exchange([(peer, buffer)], [], tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.recv`."""
        self.exchange([], [(peer, buffer)], tag=tag, deadline=deadline)

    def exchange(
        self,
        sends: Sequence[tuple[int, Array]],
        recvs: Sequence[tuple[int, Array]],
        *,
        tag: int,
        deadline: float,
    ) -> None:
        """See `Backend.exchange`.

        Raises:
            UnsupportedError: `tag` is a user's, other than 0.
        """
        if tag and not is_collective(tag):
            raise UnsupportedError(
                f"NCCL has no tags: transfers of one pair of ranks match in their order. Use tag 0 "
                f"(not {tag}), or a backend with tags for transfers"
            )
        arrays = [array for _, array in (*sends, *recvs)]
        with self._operation(deadline, *arrays) as stage:
            outgoing = [(peer, stage.reads(array)) for peer, array in sends]
            incoming = [(peer, stage.writes(array)) for peer, array in recvs]
            self._moves.exchange(outgoing, incoming)

    # -- collectives -----------------------------------------------------------------------------

    def barrier(self, *, deadline: float) -> None:
        """See `Backend.barrier`: an all_reduce of one byte, which the host waits for."""
        with self._queue.launch(deadline, (), ordered=False) as operation:
            self._moves.all_reduce(self._gpu.address(self._flag), 1, _FLAG)
        self._queue.finish(operation)

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        way = self._native(reduction)
        if way is None:
            self._meet(deadline, reduction, lambda meeting: meeting.all_reduce(buffer), buffer)
            return
        with self._operation(deadline, buffer) as stage:
            self._moves.all_reduce(stage.changes(buffer).address, buffer.size, way)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """See `Backend.reduce`."""
        way = self._native(reduction)
        if way is None:
            self._meet(deadline, reduction, lambda meeting: meeting.all_reduce(buffer), buffer)
            return
        with self._operation(deadline, buffer) as stage:
            at_root = self.rank == root
            span = stage.changes(buffer) if at_root else stage.reads(buffer)
            self._moves.reduce(span.address, buffer.size, way, root)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """See `Backend.broadcast`."""
        with self._operation(deadline, buffer) as stage:
            at_root = self.rank == root
            span = stage.reads(buffer) if at_root else stage.writes(buffer)
            self._moves.broadcast(span, root)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """See `Backend.all_gather`."""
        with self._operation(deadline, buffer) as stage:
            whole = stage.changes(buffer)
            self._moves.all_gather(cut(whole, counts, buffer.itemsize))

    def gather(
        self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float
    ) -> None:
        """See `Backend.gather`."""
        with self._operation(deadline, block, out) as stage:
            mine = stage.reads(block)
            incoming: list[tuple[int, Span]] = []
            if out is not None:
                incoming = [*enumerate(cut(stage.writes(out), counts, block.itemsize))]
            self._moves.exchange([(root, mine)], incoming)

    def scatter(
        self,
        block: Array,
        source: Array | None,
        counts: Sequence[int],
        root: int,
        *,
        deadline: float,
    ) -> None:
        """See `Backend.scatter`."""
        with self._operation(deadline, block, source) as stage:
            outgoing: list[tuple[int, Span]] = []
            if source is not None:
                outgoing = [*enumerate(cut(stage.reads(source), counts, block.itemsize))]
            self._moves.exchange(outgoing, [(root, stage.writes(block))])

    def reduce_scatter(
        self,
        source: Array,
        out: Array,
        counts: Sequence[int],
        reduction: Reduction,
        *,
        deadline: float,
    ) -> None:
        """See `Backend.reduce_scatter`."""
        way = self._native(reduction)
        if way is None:

            def meet(meeting: Meeting) -> None:
                meeting.reduce_scatter(source, out, counts)

            self._meet(deadline, reduction, meet, source, out)
            return
        with self._operation(deadline, source, out) as stage:
            given, wanted = stage.reads(source).address, stage.writes(out).address
            self._moves.reduce_scatter(given, wanted, counts, source.itemsize, way)

    def all_to_all(
        self,
        source: Array,
        out: Array,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        *,
        deadline: float,
    ) -> None:
        """See `Backend.all_to_all`."""
        with self._operation(deadline, source, out) as stage:
            outgoing = cut(stage.reads(source), send_counts, source.itemsize)
            incoming = cut(stage.writes(out), recv_counts, source.itemsize)
            self._moves.all_to_all(outgoing, incoming)

    # -- shared ----------------------------------------------------------------------------------

    def _part(self, communicator: Communicator, ranks: Sequence[int], context: int) -> NcclBackend:
        """Return a group of some of these ranks."""
        members = [self._members[rank] for rank in ranks]
        return NcclBackend(self._place, communicator, ranks.index(self.rank), members, context)

    def _native(self, reduction: Reduction) -> Native | None:
        deterministic = self.choice.deterministic
        return native(name_of(reduction.dtype), reduction.op, deterministic=deterministic)

    @contextmanager
    def _operation(self, deadline: float, *arrays: Array | None) -> Iterator[Stage]:
        """Launch an operation on these arrays; where they are the host's, wait for it."""
        staged = isinstance(arrays[0], np.ndarray)
        with self._queue.launch(deadline, arrays, ordered=not staged) as operation:
            stage = Stage(self._gpu, self._queue.stream)
            operation.hold(stage)
            yield stage
            stage.fetch()
        if staged:
            self._queue.finish(operation)
            stage.land()

    def _meet(
        self,
        deadline: float,
        reduction: Reduction,
        meet: Callable[[Meeting], None],
        *arrays: Array,
    ) -> None:
        """Carry out a reduction that NCCL does not have, where the arrays are."""
        rank, size = self.rank, self.world_size
        if isinstance(arrays[0], np.ndarray):
            meet(Meeting(HostSteps(self, deadline), rank, size, reduction))
            return
        launch = self._queue.launch(deadline, arrays, ordered=True)
        with launch, self._queue.stream:  # where the arithmetic takes place as well
            meet(Meeting(GpuSteps(self._gpu, self._moves), rank, size, reduction))
