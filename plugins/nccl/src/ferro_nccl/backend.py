"""NcclBackend: collectives on CuPy arrays, launched on a CUDA stream of the group's own.

Host arrays, such as core's small control messages, are copied through the GPU, and the host waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from ferro.arrays import dtype_name
from ferro.backend import Backend, Completion
from ferro.collectives.gathered_reduction import GatheredReduction
from ferro.collectives.label import LABEL_BYTES, Call, compare_labels, is_collective
from ferro.collectives.reduction import Reduction
from ferro.errors import UnsupportedError, UsageError
from ferro.hookspecs import BackendConfig
from ferro.types import Array, Device
from ferro_nccl.codes import BYTE, NativeReduction, RedOp, native_reduction
from ferro_nccl.collectives import Span, StreamCollectives, split_span
from ferro_nccl.library import Communicator, NcclLibrary
from ferro_nccl.operation_queue import OperationQueue
from ferro_nccl.placement import choose_gpu
from ferro_nccl.process_context import NcclOptions, ProcessContext
from ferro_nccl.reduction_transfers import GpuTransfers, HostTransfers
from ferro_nccl.staging import StagedArrays

_WORLD = 0  # the world's context number; other groups count from 1
_CLOSE_S = 5.0  # for operations under way when the group is closed
_SEGMENT_BYTES = 64 << 20  # of a gathered reduction
_BARRIER = NativeReduction(BYTE, int(RedOp.MAX))


class NcclBackend(Backend):
    """One rank of a group.

    An operation on GPU arrays is launched on this group's stream, after the work on the caller's current stream, and
    the host does not wait for it. `Work.wait` makes the current stream wait.

    Args:
        process: the objects that this process's groups share.
        communicator: this rank's end of the communicator.
        rank: this rank.
        members: the global ranks, by rank in this group.
        context: the group's number.
    """

    streams = (Device.CUDA,)
    # NCCL messages carry no labels, and comparing calls would make the host wait for the GPU in each call.
    labels_frames = True

    def __init__(
        self, process: ProcessContext, communicator: Communicator, rank: int, members: Sequence[int], context: int
    ) -> None:
        world_size = len(members)
        super().__init__(rank, world_size, process.choice)
        self._process = process
        self._members = tuple(members)
        self._gpu = process.gpu
        lost_ranks = partial(process.lost_ranks, self._members)
        store = process.group_store(context)
        self._queue = OperationQueue(process.gpu, communicator, store, lost_ranks, f"rank {rank}")
        self._collectives = StreamCollectives(
            process.library, process.gpu, communicator, self._queue.stream, rank, world_size
        )
        with self._gpu.current(), self._queue.stream:
            self._barrier_byte = self._gpu.empty(1, np.dtype(np.uint8))

    @classmethod
    def connect(cls, config: BackendConfig, library: NcclLibrary) -> NcclBackend:
        """Choose a GPU, make it this thread's current one, and connect to all other ranks.

        Raises:
            UsageError: there is no such option.
            BackendUnavailable: there is no GPU for this rank, or two ranks cannot be connected.
            RendezvousError: a rank did not come.
        """
        options = NcclOptions.parse(config.options)
        if config.choice.fixed:
            raise UsageError("nccl chooses its algorithms itself: leave algorithms= out")
        index = choose_gpu(library.device_count(), config.local_rank, options.device)
        gpu = library.gpu(index)
        gpu.use()  # so that the program makes its arrays there from now on
        process = ProcessContext(
            library=library,
            gpu=gpu,
            store=config.store,
            choice=config.choice,
            options=options,
            timeout_s=config.timeout_s,
            lost=config.lost,
        )
        communicator = process.connect(config.rank, config.world_size, _WORLD)
        return cls(process, communicator, config.rank, range(config.world_size), _WORLD)

    # -- calls and groups ------------------------------------------------------------------------

    def agree(self, call: Call, *, deadline: float) -> None:
        """Compare the ranks' calls where the user asked for it; see `NcclOptions.check_calls`."""
        self.call = call
        if not self._process.options.check_calls:
            return
        labels = np.empty((self.world_size, LABEL_BYTES), np.uint8)
        labels[self.rank] = np.frombuffer(call.label(), np.uint8)
        counts = (LABEL_BYTES,) * self.world_size
        self.all_gather(labels.reshape(-1), counts, deadline=deadline)
        for rank, label in enumerate(labels):
            compare_labels(self.rank, call, rank, label.tobytes())

    def launched(self) -> Completion:
        """See `Backend.launched`."""
        return self._queue.last

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Make a group with a communicator of its own; only its members call this."""
        rank, size = ranks.index(self.rank), len(ranks)
        communicator = self._process.connect(rank, size, context)
        return self._make_group(communicator, ranks, context)

    def split(self, ranks: Sequence[int] | None, context: int) -> Backend | None:
        """Split all ranks into groups and make the group of this rank; see `ncclCommSplit`."""
        deadline = time.monotonic() + self._process.timeout_s
        if ranks is None:
            self._queue.split(-1, 0, deadline)
            return None
        communicator = self._queue.split(ranks[0], ranks.index(self.rank), deadline)
        assert communicator is not None, "a rank with a color is in a group"
        return self._make_group(communicator, ranks, context)

    def abort(self) -> None:
        """End all operations, here at once and on the other ranks within about a second."""
        self._queue.abort()

    def close(self) -> None:
        """Let operations end, for a few seconds at most; then release the communicator."""
        self._queue.close(time.monotonic() + _CLOSE_S)

    # -- transfers -------------------------------------------------------------------------------

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.send`; this rank's next operations start when the message has been received."""
        self.exchange([(peer, buffer)], [], tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.recv`."""
        self.exchange([], [(peer, buffer)], tag=tag, deadline=deadline)

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """See `Backend.exchange`.

        Raises:
            UnsupportedError: `tag` is a user's, and not 0.
        """
        if tag and not is_collective(tag):
            raise UnsupportedError(
                f"NCCL has no tags: transfers of one pair of ranks match in their order. Use tag 0 "
                f"(not {tag}), or a backend with tags for transfers"
            )
        arrays = [array for _, array in (*sends, *recvs)]
        with self._operation(deadline, *arrays) as staged:
            outgoing = [(peer, staged.input(array)) for peer, array in sends]
            incoming = [(peer, staged.output(array)) for peer, array in recvs]
            self._collectives.exchange(outgoing, incoming)

    # -- collectives -----------------------------------------------------------------------------

    def barrier(self, *, deadline: float) -> None:
        """See `Backend.barrier`: an all_reduce of one byte, which the host waits for."""
        with self._queue.launch(deadline, (), ordered=False) as operation:
            self._collectives.all_reduce(self._gpu.address(self._barrier_byte), 1, _BARRIER)
        self._queue.finish(operation)

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        native = self._native(reduction)
        if native is None:
            self._reduce_gathered(deadline, reduction, lambda one: one.all_reduce(buffer), buffer)
            return
        with self._operation(deadline, buffer) as staged:
            self._collectives.all_reduce(staged.in_out(buffer).address, buffer.size, native)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """See `Backend.reduce`."""
        native = self._native(reduction)
        if native is None:
            self._reduce_gathered(deadline, reduction, lambda one: one.all_reduce(buffer), buffer)
            return
        with self._operation(deadline, buffer) as staged:
            at_root = self.rank == root
            span = staged.in_out(buffer) if at_root else staged.input(buffer)
            self._collectives.reduce(span.address, buffer.size, native, root)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """See `Backend.broadcast`."""
        with self._operation(deadline, buffer) as staged:
            at_root = self.rank == root
            span = staged.input(buffer) if at_root else staged.output(buffer)
            self._collectives.broadcast(span, root)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """See `Backend.all_gather`."""
        with self._operation(deadline, buffer) as staged:
            whole = staged.in_out(buffer)
            self._collectives.all_gather(split_span(whole, counts, buffer.itemsize))

    def gather(self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.gather`."""
        with self._operation(deadline, block, out) as staged:
            mine = staged.input(block)
            incoming: list[tuple[int, Span]] = []
            if out is not None:
                incoming = [*enumerate(split_span(staged.output(out), counts, block.itemsize))]
            self._collectives.exchange([(root, mine)], incoming)

    def scatter(self, block: Array, source: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.scatter`."""
        with self._operation(deadline, block, source) as staged:
            outgoing: list[tuple[int, Span]] = []
            if source is not None:
                outgoing = [*enumerate(split_span(staged.input(source), counts, block.itemsize))]
            self._collectives.exchange(outgoing, [(root, staged.output(block))])

    def reduce_scatter(
        self, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, *, deadline: float
    ) -> None:
        """See `Backend.reduce_scatter`."""
        native = self._native(reduction)
        if native is None:

            def reduce_scatter(gathered: GatheredReduction) -> None:
                gathered.reduce_scatter(source, out, counts)

            self._reduce_gathered(deadline, reduction, reduce_scatter, source, out)
            return
        with self._operation(deadline, source, out) as staged:
            from_address, to_address = staged.input(source).address, staged.output(out).address
            self._collectives.reduce_scatter(from_address, to_address, counts, source.itemsize, native)

    def all_to_all(
        self, source: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, deadline: float
    ) -> None:
        """See `Backend.all_to_all`."""
        with self._operation(deadline, source, out) as staged:
            outgoing = split_span(staged.input(source), send_counts, source.itemsize)
            incoming = split_span(staged.output(out), recv_counts, source.itemsize)
            self._collectives.all_to_all(outgoing, incoming)

    # -- shared by the collectives ---------------------------------------------------------------

    def _make_group(self, communicator: Communicator, ranks: Sequence[int], context: int) -> NcclBackend:
        """Make a group of some of these ranks on their communicator."""
        members = [self._members[rank] for rank in ranks]
        return NcclBackend(self._process, communicator, ranks.index(self.rank), members, context)

    def _native(self, reduction: Reduction) -> NativeReduction | None:
        deterministic = self.choice.deterministic
        return native_reduction(dtype_name(reduction.dtype), reduction.op, deterministic=deterministic)

    @contextmanager
    def _operation(self, deadline: float, *arrays: Array | None) -> Iterator[StagedArrays]:
        """Launch an operation on these arrays; if they are host arrays, wait until it ends."""
        on_host = isinstance(arrays[0], np.ndarray)
        with self._queue.launch(deadline, arrays, ordered=not on_host) as operation:
            staged = StagedArrays(self._gpu, self._queue.stream)
            operation.hold(staged)
            yield staged
            staged.launch_copies_back()
        if on_host:
            self._queue.finish(operation)
            staged.fill_host_arrays()

    def _reduce_gathered(
        self, deadline: float, reduction: Reduction, reduce: Callable[[GatheredReduction], None], *arrays: Array
    ) -> None:
        """Carry out a reduction that NCCL does not have, on the device of the arrays."""
        if isinstance(arrays[0], np.ndarray):
            reduce(self._gathered(HostTransfers(self, deadline), reduction))
            return
        launch = self._queue.launch(deadline, arrays, ordered=True)
        with launch, self._queue.stream:  # CuPy's arithmetic takes place on the same stream
            reduce(self._gathered(GpuTransfers(self._gpu, self._collectives), reduction))

    def _gathered(self, transfers: HostTransfers | GpuTransfers, reduction: Reduction) -> GatheredReduction:
        return GatheredReduction(transfers, self.rank, self.world_size, reduction, segment_bytes=_SEGMENT_BYTES)
