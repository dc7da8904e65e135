"""Bootstrap of a communicator: the ranks of a group exchange a unique id, then NCCL connects them.

NCCL waits for all ranks, without a deadline. So ferro calls it only when all ranks have reported to the store and can
be connected, and in a thread that ferro abandons if the deadline passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from ferro.errors import BackendUnavailable, RendezvousError
from ferro.rendezvous import Store
from ferro_nccl.library import Communicator, Gpu, NcclLibrary
from ferro_nccl.placement import RankPlacement, find_conflict
from ferro_nccl.watchdog import call_with_deadline


def connect(
    library: NcclLibrary, gpu: Gpu, store: Store, placement: RankPlacement, world_size: int, deadline: float
) -> Communicator:
    """Join the communicator of a new group; every rank calls this.

    Args:
        library: the functions of CuPy and NCCL.
        gpu: this rank's GPU.
        store: the group's own part of the job's key-value store.
        placement: this rank's host, GPU and NCCL.
        world_size: number of ranks.
        deadline: absolute `time.monotonic()` second.

    Raises:
        RendezvousError: a rank did not come in time; the message names it.
        BackendUnavailable: two ranks cannot be connected; raised on every rank, and names both.
    """
    unique_id = _exchange_unique_id(store, placement, world_size, library.unique_id, deadline)

    def join() -> Communicator:
        with gpu.current():
            return library.connect(world_size, unique_id, placement.rank)

    try:
        return call_with_deadline(join, deadline, "connecting")
    except TimeoutError as error:
        raise RendezvousError(
            f"{placement.describe()}: all {world_size} ranks had come, but NCCL did not connect "
            "them by the deadline. Run again with NCCL_DEBUG=INFO, which tells what it waits for: "
            "often a network interface that hosts cannot reach each other by (NCCL_SOCKET_IFNAME).",
            rank=placement.rank,
        ) from error


def _exchange_unique_id(
    store: Store, placement: RankPlacement, world_size: int, new_id: Callable[[], bytes], deadline: float
) -> bytes:
    """Return the unique id, which rank 0 makes once all ranks have come and no two of them conflict."""
    if placement.rank != 0:
        store.set(f"placement/{placement.rank}", placement.encode())
        # This waits a second longer than rank 0 waits for placements, because rank 0's answer names an absent rank.
        raw = _get(store, "answer", deadline + 1.0, placement, 0)
    else:
        raw = _check_placements(store, placement, world_size, new_id, deadline)
        store.set("answer", raw)
    answer = json.loads(raw)
    if "missing" in answer:
        raise _absent(placement, answer["missing"])
    if "reason" in answer:
        raise BackendUnavailable("nccl", answer["reason"], answer["hint"])
    return bytes.fromhex(answer["id"])


def _check_placements(
    store: Store, placement: RankPlacement, world_size: int, new_id: Callable[[], bytes], deadline: float
) -> bytes:
    """Return rank 0's answer to all ranks: the unique id, an absent rank, or a conflict of two ranks."""
    placements = [placement]
    for rank in range(1, world_size):
        try:
            raw = store.get(f"placement/{rank}", deadline=deadline)
        except TimeoutError:
            return json.dumps({"missing": rank}).encode()
        placements.append(RankPlacement.decode(raw))
    if conflict := find_conflict(placements):
        return json.dumps(dict(zip(("reason", "hint"), conflict, strict=True))).encode()
    return json.dumps({"id": new_id().hex()}).encode()


def _get(store: Store, key: str, deadline: float, placement: RankPlacement, peer: int) -> bytes:
    try:
        return store.get(key, deadline=deadline)
    except TimeoutError as error:
        raise _absent(placement, peer) from error


def _absent(placement: RankPlacement, peer: int) -> RendezvousError:
    return RendezvousError(
        f"{placement.describe()} wants to connect over NCCL, but rank {peer} did not come by the "
        f"deadline. Read the log of rank {peer} first",
        rank=placement.rank,
        peer=peer,
    )
