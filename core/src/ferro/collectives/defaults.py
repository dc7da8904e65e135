"""The defaults of a backend: agreement on the call, concurrent transfers, and each collective as a schedule.

`ferro.Backend` calls these functions where a backend has nothing better; each collective here is the default of the
method with its name.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ferro.collectives.choice import build
from ferro.collectives.executor import Execution, Transfer, Transport
from ferro.collectives.label import LABEL_BYTES, Call, compare_labels
from ferro.collectives.partition import blocks, near_equal
from ferro.collectives.reduction import Reduction
from ferro.types import Array

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

# The bound is never met: the pool makes a thread only when none is idle, and a sender that waits for its peer must not
# hold up the senders of another group.
_MAX_SENDERS = 4096

# In these calls some ranks only send (the root in the first two, the other ranks in the last two), so they would not
# notice a rank that makes another call.
_ROOT_SENDS = ("broadcast", "scatter")
_ROOT_RECEIVES = ("reduce", "gather")
_STAR_RANKS = 16  # up to this many ranks, all of them can report to rank 0 at once
_EMPTY = np.empty(0, np.uint8)


class SenderThreads:
    """Threads that send while the caller receives: an `exchange` made of `send` and `recv`."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def exchange(
        self, transport: Transport, sends: Sequence[Transfer], recvs: Sequence[Transfer], *, tag: int, deadline: float
    ) -> None:
        """Do all transfers at the same time: every destination has a sending thread of its own."""
        by_peer: dict[int, list[Array]] = {}
        for peer, buffer in sends:
            by_peer.setdefault(peer, []).append(buffer)
        # The import stands here since it imports logging, and most backends have an exchange of their own.
        from concurrent.futures import ThreadPoolExecutor, wait

        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_MAX_SENDERS, "ferro-send")

        def send_all(peer: int, buffers: Sequence[Array]) -> None:
            for buffer in buffers:
                transport.send(buffer, peer, tag=tag, deadline=deadline)

        sending: list[Future[None]] = [self._pool.submit(send_all, peer, buffers) for peer, buffers in by_peer.items()]
        try:
            for peer, buffer in recvs:
                transport.recv(buffer, peer, tag=tag, deadline=deadline)
        finally:  # the buffers are the caller's again afterwards, even after a failure
            wait(sending, max(0.0, deadline - time.monotonic()))
        for future in sending:
            future.result(max(0.0, deadline - time.monotonic()))


def agree(transport: Transport, call: Call, deadline: float) -> None:
    """Compare this rank's call with the other ranks' calls, and raise CollectiveMismatch if they differ.

    The ranks exchange labels in log2(n) rounds (the dissemination barrier), so a rank returns only when all ranks have
    called this. A backend that labels its frames needs that for rooted calls of many ranks only. With few ranks, all
    report to rank 0, which then lets a sending root begin; in a call in which the root receives, `release` follows.
    """
    rooted = call.op in _ROOT_SENDS or call.op in _ROOT_RECEIVES
    few = transport.world_size <= _STAR_RANKS
    if transport.labels_frames and rooted and few:
        _report(transport, call, deadline)
    elif not transport.labels_frames or (rooted and not few):
        mine = np.frombuffer(call.label(), np.uint8)
        theirs = np.empty(LABEL_BYTES, np.uint8)
        distance = 1
        while distance < transport.world_size:
            target = (transport.rank + distance) % transport.world_size
            source = (transport.rank - distance) % transport.world_size
            transport.exchange([(target, mine)], [(source, theirs)], tag=transport.tag, deadline=deadline)
            compare_labels(transport.rank, call, source, theirs.tobytes())
            distance *= 2


def _report(transport: Transport, call: Call, deadline: float) -> None:
    """Send an empty frame, which carries the label, from every rank to rank 0."""
    answered = call.op in _ROOT_SENDS and call.root != 0
    if transport.rank != 0:
        awaited = [(0, _EMPTY)] if answered and transport.rank == call.root else []
        transport.exchange([(0, _EMPTY)], awaited, tag=transport.tag, deadline=deadline)
        return
    others = [(rank, _EMPTY) for rank in range(1, transport.world_size)]
    transport.exchange([], others, tag=transport.tag, deadline=deadline)
    if answered:
        transport.exchange([(call.root, _EMPTY)], [], tag=transport.tag, deadline=deadline)


def release(transport: Transport, deadline: float) -> None:
    """End a call in which the root receives: no rank returns before rank 0 has received every rank's label."""
    if not transport.labels_frames or transport.world_size > _STAR_RANKS:
        return
    others = [(rank, _EMPTY) for rank in range(1, transport.world_size)]
    sends, recvs = (others, []) if transport.rank == 0 else ([], [(0, _EMPTY)])
    transport.exchange(sends, recvs, tag=transport.tag, deadline=deadline)


def barrier(transport: Transport, deadline: float) -> None:
    if transport.labels_frames:  # otherwise `agree` was a barrier already
        _run(transport, "barrier", [], 0, deadline=deadline)


def all_reduce(transport: Transport, buffer: Array, reduction: Reduction, deadline: float) -> None:
    _run(transport, "all_reduce", buffer, buffer.nbytes, reduction=reduction, deadline=deadline)


def reduce(transport: Transport, buffer: Array, reduction: Reduction, root: int, deadline: float) -> None:
    _run(transport, "reduce", buffer, buffer.nbytes, root, reduction=reduction, deadline=deadline)
    release(transport, deadline)


def broadcast(transport: Transport, buffer: Array, root: int, deadline: float) -> None:
    _run(transport, "broadcast", buffer, buffer.nbytes, root, deadline=deadline)


def all_gather(transport: Transport, buffer: Array, counts: Sequence[int], deadline: float) -> None:
    _run(transport, "all_gather", blocks(buffer, counts), buffer.nbytes, deadline=deadline)


def gather(
    transport: Transport, block: Array, out: Array | None, counts: Sequence[int], root: int, deadline: float
) -> None:
    if out is not None:
        blocks(out, counts)[root][...] = block
    chunks = _rooted_chunks(transport, block, out, counts)
    _run(transport, "gather", chunks, sum(counts) * block.itemsize, root, deadline=deadline)
    release(transport, deadline)


def scatter(
    transport: Transport, block: Array, source: Array | None, counts: Sequence[int], root: int, deadline: float
) -> None:
    chunks = _rooted_chunks(transport, block, source, counts)
    _run(transport, "scatter", chunks, sum(counts) * block.itemsize, root, deadline=deadline)
    if source is not None:
        block[...] = blocks(source, counts)[root]


def reduce_scatter(
    transport: Transport, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, deadline: float
) -> None:
    n, me = transport.world_size, transport.rank
    info = transport.choice.algorithm("reduce_scatter", n, source.nbytes, at_once=reduction.needs_all)
    schedule = build(info, me, n, 0)
    chunks = blocks(source, counts)
    for number in {c for r in schedule.rounds for recv in r.recvs for c in recv.chunks} - {me}:
        chunks[number] = chunks[number].copy()  # the schedule writes into it, and `source` must not change
    out[...] = chunks[me]
    chunks[me] = out
    Execution(transport, schedule, chunks, reduction, info.combines_once).run(deadline)
    if not info.combines_once:
        reduction.finish(out)


def all_to_all(
    transport: Transport, source: Array, out: Array, sent: Sequence[int], received: Sequence[int], deadline: float
) -> None:
    n, me = transport.world_size, transport.rank
    outgoing, incoming = blocks(source, sent), blocks(out, received)
    chunks: list[Array | None] = [None] * (n * n)
    chunks[me * n : (me + 1) * n] = outgoing
    chunks[me::n] = incoming
    chunks[me * n + me] = None  # this block stays here
    incoming[me][...] = outgoing[me]
    # The ranks may have different sizes here, so no size may enter the choice of the algorithm.
    _run(transport, "all_to_all", chunks, 0, deadline=deadline)


def _run(
    transport: Transport,
    collective: str,
    data: Array | Sequence[Array | None],
    nbytes: int,
    root: int = 0,
    *,
    reduction: Reduction | None = None,
    deadline: float,
) -> None:
    """Run the chosen schedule over the given chunks, or over a buffer cut into equal ones."""
    at_once = reduction is not None and reduction.needs_all
    info = transport.choice.algorithm(collective, transport.world_size, nbytes, at_once=at_once)
    schedule = build(info, transport.rank, transport.world_size, root)
    chunks = near_equal(data, schedule.chunks) if isinstance(data, np.ndarray) else data
    Execution(transport, schedule, chunks, reduction, info.combines_once).run(deadline)
    if reduction is not None and not info.combines_once and isinstance(data, np.ndarray):
        reduction.finish(data)


def _rooted_chunks(transport: Transport, block: Array, whole: Array | None, counts: Sequence[int]) -> Sequence[Array]:
    """List all ranks' blocks; on other ranks than the root, the others' blocks are memory for relaying."""
    if whole is not None:
        return blocks(whole, counts)
    return [block if rank == transport.rank else np.empty(n, block.dtype) for rank, n in enumerate(counts)]
