"""Membership: the ranks enter a world together, and see one another's records before they connect to each other.

Ranks that do not fit together (a rank twice, another world size, version, backend or set of plugins) are an error on
every rank, which names the ranks that differ.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ferro.errors import RendezvousError
from ferro.rendezvous.store.interface import Store, StoreGone, StoreTimeout
from ferro.rendezvous.store.liveness import LOST_KEY, FailureDetector

_POLL_S = 1.0  # how often a waiting rank looks whether its world is over
_LEAVING_S = 2.0  # for the ranks of a complete world to leave it
_LEAVING_POLL_S = 0.05

_MUST_AGREE = {
    "version": "the version of ferro",
    "world_size": "world size",
    "backend": "the backend",
    "plugins": "their plugins",
    "settings": "their settings",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """One rank's description of itself."""

    rank: int
    world_size: int
    host: str
    pid: int
    address: str  # its own, on its connection to the store
    version: str  # of ferro
    backend: str
    plugins: dict[str, str] = field(default_factory=dict)  # entry point -> distribution and version
    settings: str = ""  # all other things that must be equal, as text
    problem: str = ""  # why it cannot take part

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def enter_world(
    root: Store, mine: RankRecord, *, begin: Callable[[Store], None], deadline: float
) -> tuple[FailureDetector, list[RankRecord]]:
    """Enter the newest world of a store with all its other ranks, until `deadline`.

    Processes with different pasts cannot count worlds alike, so worlds are numbered in the store. A world is over as
    soon as one of its ranks has left it or died, and ranks that come then enter the next one. `begin` is given a
    world's part of the store before this rank becomes one of its ranks; the last one is the world that was entered.
    Returns its detector of lost ranks, and all records by rank; RendezvousError names the ranks that are missing or do
    not fit together.
    """
    number, started = 0, time.monotonic()
    gone: dict[int, RankRecord] = {}  # of ranks that came while this one waited, and gave up or died
    while True:
        number = max(number, root.add("newest world", 0))
        world = root.prefix(f"world{number}")
        if not _is_over(world) and (entered := _enter(world, mine, begin, started, deadline, gone)):
            return entered
        misfit = _value(world, "misfit")
        if misfit and mine.rank not in {record.rank for record in _present(world)}:
            raise RendezvousError(misfit.decode())  # this rank comes late to ranks that did not fit together
        number += 1
        root.set("newest world", b"%d" % number)  # a late writer may set it back, which costs a few more requests


def _enter(
    world: Store,
    mine: RankRecord,
    begin: Callable[[Store], None],
    started: float,
    deadline: float,
    gone: dict[int, RankRecord],
) -> tuple[FailureDetector, list[RankRecord]] | None:
    """Publish this rank's record and wait for the others'; None when the world is over before it is complete."""
    place = world.add("joined", 1)
    world.set(f"join/{place}", json.dumps(asdict(mine)).encode())
    records: dict[int, RankRecord] = {}
    try:
        first = _read(world.get("join/1", deadline=deadline))
        if place > first.world_size:
            _refuse_late(world, mine, first.world_size, deadline)
            return None
        begin(world)
        lost = FailureDetector(world, mine.rank)
        for number in range(1, mine.world_size + 1):
            while (raw := _value(world, f"join/{number}", min(deadline, time.monotonic() + _POLL_S))) is None:
                if _is_over(world):
                    gone |= {rank: record for rank, record in records.items() if rank != mine.rank}
                    return None
                if time.monotonic() >= deadline:
                    raise TimeoutError
            _add_record(records, _read(raw), mine)
    except TimeoutError as error:
        raise RendezvousError(
            f"after {time.monotonic() - started:.1f} s rank {mine.rank} still misses {_missing(mine, records, gone)}. "
            "Check that they were started, that they reach ferro.init(), and read their logs; allow more time with "
            "timeout_s."
        ) from error
    except RendezvousError as error:
        if not isinstance(error, StoreGone):
            world.set("misfit", str(error).encode())
        raise
    # Where a rank has left since, the others may have given up before they saw the last one come. But where one of them
    # entered, all do, and learn of the loss there.
    if _is_over(world) and not world.add("entered", 0):
        return None
    world.add("entered", 1)
    return lost, [records[rank] for rank in sorted(records)]


def _missing(mine: RankRecord, records: Mapping[int, RankRecord], gone: Mapping[int, RankRecord]) -> str:
    """Name the ranks that never came, and those that gave up or died."""
    absent = set(range(mine.world_size)) - set(records)
    left = ", ".join(str(gone[rank]) for rank in sorted(absent & set(gone)))
    return (
        f"ranks {sorted(absent - set(gone) or absent)} of {mine.world_size} (present: {sorted(records)}"
        f"{'; came, and gave up or died: ' if left else ''}{left})"
    )


def _refuse_late(world: Store, mine: RankRecord, size: int, deadline: float) -> None:
    """Wait a moment for a complete world to be over, as when its ranks are leaving; raise an error when it goes on."""
    until = min(deadline, time.monotonic() + _LEAVING_S)
    while not _is_over(world):
        if time.monotonic() >= until:
            members = _present(world)[:size]
            twin = next((str(record) for record in members if record.rank == mine.rank), "")
            raise RendezvousError(
                f"{mine} came to a world of {size} that is complete and at work: {', '.join(map(str, members))}. "
                + (f"{twin} is this rank already: was this process started by it, with its variables? " if twin else "")
                + "Is another job using this store? Give each job a port or store of its own, or wait for the other "
                "one to end."
            )
        time.sleep(_LEAVING_POLL_S)


def _is_over(world: Store) -> bool:
    """Say whether a rank has left this world in good order, or was lost."""
    return _value(world, "goodbye") is not None or _value(world, LOST_KEY) is not None


def _value(store: Store, key: str, deadline: float = 0.0) -> bytes | None:
    with suppress(StoreTimeout):
        return store.get(key, deadline=deadline)
    return None


def _present(world: Store) -> list[RankRecord]:
    """List the records that have been published in a world."""
    raw = (_value(world, f"join/{place}") for place in range(1, world.add("joined", 0) + 1))
    return [_read(record) for record in raw if record is not None]


def _add_record(records: dict[int, RankRecord], record: RankRecord, mine: RankRecord) -> None:
    """Add the record of a rank that fits to those of the others; RendezvousError says why it does not."""
    _compare(next(iter(records.values()), mine), record)
    if other := records.get(record.rank):
        raise RendezvousError(
            f"rank {record.rank} is there twice: pid {other.pid} on host {other.host} and pid {record.pid} on "
            f"host {record.host}. Give every process its own rank."
        )
    records[record.rank] = record


def _read(raw: bytes) -> RankRecord:
    """Read a record, also one by another version of ferro, which may have other fields."""
    said = json.loads(raw)
    blank: dict[str, Any] = {"rank": -1, "world_size": 0, "host": "?", "pid": 0, "address": ""}
    blank |= {"version": "unknown", "backend": ""}
    return RankRecord(**blank | {f.name: said[f.name] for f in fields(RankRecord) if f.name in said})


def _compare(reference: RankRecord, record: RankRecord) -> None:
    if record.problem:
        raise RendezvousError(f"{record} cannot take part: {record.problem}")
    for name, what in _MUST_AGREE.items():
        theirs, ours = getattr(record, name), getattr(reference, name)
        if theirs != ours:
            raise RendezvousError(
                f"ranks differ in {what}: {record} has {_difference(theirs, ours)}, but {reference} has "
                f"{_difference(ours, theirs)}. Start all ranks alike: the same command, the same packages, the same "
                "arguments to ferro.init()."
            )


def _difference(value: object, other: object) -> str:
    """Show a value in a message; of a table, only the entries that differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        own = {name: v for name, v in value.items() if other.get(name) != v}
        return ", ".join(f"{name} from {v}" for name, v in sorted(own.items())) or "none of these"
    return repr(value)
