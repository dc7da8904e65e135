"""Conformance of transfers between two ranks, and of their tags."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from ferro import ProcessGroup
from ferro_testing.case import Case
from ferro_testing.differences import TRANSFERS
from ferro_testing.samples import Findings, sample

_TAGS = (0, 1, 7)
_POSTED_S = 20.0


def check_transfers(case: Case) -> None:
    """Every rank sends to every other; messages with one tag arrive in the order sent."""
    if case.supports(*TRANSFERS):
        case.verify_all(_transfer, case.carried(*TRANSFERS))


def check_tags(case: Case) -> None:
    """Tags keep messages apart, in whatever order they are received."""
    if case.supports("send", "recv", "tags"):
        case.verify_all(_transfer_by_tag)


def check_posted_transfers(case: Case) -> None:
    """`Backend.posted_transfers` begins any number of transfers without waiting, and tells which have ended."""
    if case.supports(*TRANSFERS, "tags"):
        case.verify_all(_post)


def _post(group: ProcessGroup) -> list[str]:
    """Post more than fits any buffer, to and from all ranks, before anybody receives."""
    found, me = Findings(group.rank), group.rank
    posted, deadline = group._backend.posted_transfers(), time.monotonic() + _POSTED_S
    posted.wake()
    found.true(not posted.wait_any(deadline), "wait_any tells of a transfer, and none was posted")
    found.true(time.monotonic() < deadline, "wake does not end the next wait_any")
    found.true(not posted.wait_any(time.monotonic() + 0.01), "wait_any tells of a transfer when its time is over")
    others = [rank for rank in range(group.world_size) if rank != me]
    # The group posts one transfer at a time in a channel: a direction, a peer and a tag.
    keys = [(peer, tag, size) for peer in others for tag, size in zip(_TAGS, (70_000, 0, 3), strict=True)]
    sent = {key: sample(me, (key[2],), "float32", salt=key[0] + 10 * key[1]).copy() for key in keys}
    buffers = {}
    for (peer, tag, size), message in sent.items():
        posted.isend(("send", peer, tag, size), message, peer, tag=tag, deadline=deadline)
    for peer, tag, size in reversed(keys):
        buffers[peer, tag, size] = buffer = np.empty(size, np.float32)
        posted.irecv(("recv", peer, tag, size), buffer, peer, tag=tag, deadline=deadline)
    awaited = {(verb, *key) for key in keys for verb in ("send", "recv")}
    while awaited and time.monotonic() < deadline:
        for handle, error in posted.wait_any(deadline):
            found.true(error is None, f"posted {handle} raised {error!r}")
            found.true(handle in awaited, f"posted {handle} ended twice")
            awaited.discard(handle)
    found.true(not awaited, f"posted transfers have not ended: {sorted(awaited)[:3]}")
    for (peer, tag, size), buffer in buffers.items():
        wanted = sample(peer, (size,), "float32", salt=me + 10 * tag)
        found.same(buffer, wanted, f"posted recv of {size} from rank {peer}, tag {tag}")
    group.barrier()
    return found.report()


def _transfer(group: ProcessGroup, dtypes: Sequence[str]) -> list[str]:
    found = Findings(group.rank)
    if group.world_size == 1:
        return []
    for shape in ((), (0,), (5, 3), (100_000,)):
        _transfer_to_all(group, shape, (0,), found)
    _transfer_around(group, dtypes, found)
    _transfer_in_order(group, found)
    return found.report()


def _transfer_by_tag(group: ProcessGroup) -> list[str]:
    found = Findings(group.rank)
    for shape in ((), (0,), (5, 3), (100_000,)):
        _transfer_to_all(group, shape, _TAGS, found)
    return found.report()


def _transfer_to_all(group: ProcessGroup, shape: tuple[int, ...], tags: Sequence[int], found: Findings) -> None:
    """Send to every rank with every tag; receive in another order, of ranks and of tags."""
    me = group.rank
    others = [rank for rank in range(group.world_size) if rank != me]
    sends = [
        group.send(sample(me, shape, "float32", salt=peer + 10 * tag), peer, tag, async_op=True)
        for peer in others
        for tag in tags
    ]
    for tag in (*tags[-1:], *tags[:-1]):
        for peer in reversed(others):
            buffer = np.empty(shape, np.float32)
            result = group.recv(buffer, peer, tag)
            found.true(result is buffer, "recv does not return its buffer")
            wanted = sample(peer, shape, "float32", salt=me + 10 * tag)
            found.same(buffer, wanted, f"recv of {list(shape)} from rank {peer}, tag {tag}")
    for work in sends:
        work.wait()


def _transfer_around(group: ProcessGroup, dtypes: Sequence[str], found: Findings) -> None:
    """Sendrecv on a ring: to the next rank, from the one before; small and large."""
    n, me = group.world_size, group.rank
    after, before = (me + 1) % n, (me - 1) % n
    for dtype in dtypes:
        for shape in ((), (0,), (3, 5), (50_000,)):
            given = sample(me, shape, dtype)
            buffer = np.empty(shape, given.dtype)
            group.sendrecv(given, buffer, after, before)
            found.same(buffer, sample(before, shape, dtype), f"sendrecv of {dtype}{list(shape)}")


def _transfer_in_order(group: ProcessGroup, found: Findings) -> None:
    """Messages with one tag arrive in the order sent, also into receives that wait already."""
    n, me = group.world_size, group.rank
    after, before = (me + 1) % n, (me - 1) % n
    buffers = [np.empty(index * 100 + 1) for index in range(8)]
    receives = [group.recv(buffer, before, async_op=True) for buffer in buffers]
    for index, buffer in enumerate(buffers):
        group.send(np.full(buffer.shape, me * 100.0 + index), after)
    for index, (buffer, work) in enumerate(zip(buffers, receives, strict=True)):
        work.wait()
        found.same(buffer, np.full(buffer.shape, before * 100.0 + index), f"message {index}")
