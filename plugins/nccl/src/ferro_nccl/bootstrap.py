"""How the ranks of a group come by a communicator: a roll call in the store, then NCCL's own.

NCCL's waits for all ranks, for ever. So it is called only when the store has shown that all are
there and go together, and in a thread that can be left behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from ferro.errors import BackendUnavailable, RendezvousError
from ferro.rendezvous import Store
from ferro_nccl.bounded import bounded
from ferro_nccl.library import Communicator, Gpu, Library
from ferro_nccl.placement import Card, objection


def connect(
    library: Library, gpu: Gpu, store: Store, card: Card, world_size: int, deadline: float
) -> Communicator:
    """Join the communicator of a new group; every rank does.

    Args:
        library: CuPy and NCCL.
        gpu: this rank's.
        store: the group's own part of the job's store.
        card: what this rank tells of itself.
        world_size: number of ranks.
        deadline: absolute `time.monotonic()` second.

    Raises:
        RendezvousError: not all ranks came in time; says who.
        BackendUnavailable: they do not go together; says who, on every rank.
    """
    unique_id = _meet(store, card, world_size, library.unique_id, deadline)

    def join() -> Communicator:
        with gpu.current():
            return library.connect(world_size, unique_id, card.rank)

    try:
        return bounded(join, deadline, "connecting")
    except TimeoutError as error:
        raise RendezvousError(
            f"{card.who()}: all {world_size} ranks had come, but NCCL did not connect them by "
            "the deadline. Run again with NCCL_DEBUG=INFO, which tells what it waits for: often "
            "a network interface that hosts cannot reach each other by (NCCL_SOCKET_IFNAME).",
            rank=card.rank,
        ) from error


def _meet(
    store: Store, card: Card, world_size: int, new_id: Callable[[], bytes], deadline: float
) -> bytes:
    """Return the unique id; rank 0 gives it out when all have come and go together."""
    if card.rank != 0:
        store.set(f"card/{card.rank}", card.encode())
        # Longer than rank 0 waits for the cards: it says who is missing.
        raw = _get(store, "verdict", deadline + 1.0, card, 0)
    else:
        raw = _judge(store, card, world_size, new_id, deadline)
        store.set("verdict", raw)
    verdict = json.loads(raw)
    if "missing" in verdict:
        raise _absent(card, verdict["missing"])
    if "reason" in verdict:
        raise BackendUnavailable("nccl", verdict["reason"], verdict["hint"])
    return bytes.fromhex(verdict["id"])


def _judge(
    store: Store, card: Card, world_size: int, new_id: Callable[[], bytes], deadline: float
) -> bytes:
    """Return what rank 0 tells all: the id, who is missing, or why they do not go together."""
    cards = [card]
    for rank in range(1, world_size):
        try:
            cards.append(Card.decode(store.get(f"card/{rank}", deadline=deadline)))
        except TimeoutError:
            return json.dumps({"missing": rank}).encode()
    if found := objection(cards):
        return json.dumps(dict(zip(("reason", "hint"), found, strict=True))).encode()
    return json.dumps({"id": new_id().hex()}).encode()


def _get(store: Store, key: str, deadline: float, card: Card, peer: int) -> bytes:
    try:
        return store.get(key, deadline=deadline)
    except TimeoutError as error:
        raise _absent(card, peer) from error


def _absent(card: Card, peer: int) -> RendezvousError:
    return RendezvousError(
        f"{card.who()} wants to connect over NCCL, but rank {peer} did not come by the deadline. "
        f"Read the log of rank {peer} first",
        rank=card.rank,
        peer=peer,
    )
