"""The membership check: every rank sees every rank's record before they connect to each other.

Ranks that do not fit together (a rank twice, another world size, version, backend or set of plugins) are an error on
every rank, which names the ranks that differ.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ferro.errors import RendezvousError
from ferro.rendezvous.store.interface import Store

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


def check_membership(store: Store, mine: RankRecord, *, deadline: float) -> list[RankRecord]:
    """Publish this rank's record, wait for the others' until `deadline`, and return all, by rank.

    RendezvousError names the ranks that are missing or do not fit together.
    """
    started = time.monotonic()
    place = store.add("joined", 1)
    store.set(f"join/{place}", json.dumps(asdict(mine)).encode())
    records: dict[int, RankRecord] = {}
    for number in range(1, mine.world_size + 1):
        try:
            raw = store.get(f"join/{number}", deadline=deadline)
        except TimeoutError as error:
            present = sorted(records)
            raise RendezvousError(
                f"after {time.monotonic() - started:.1f} s rank {mine.rank} still misses ranks "
                f"{sorted(set(range(mine.world_size)) - set(present))} of {mine.world_size} (present: {present}). "
                "Check that they were started, that they reach ferro.init(), and read their logs; allow more time "
                "with timeout_s."
            ) from error
        record = _read(raw)
        _compare(next(iter(records.values()), mine), record)
        if other := records.get(record.rank):
            raise RendezvousError(
                f"rank {record.rank} is there twice: pid {other.pid} on host {other.host} and pid {record.pid} on "
                f"host {record.host}. Give every process its own rank."
            )
        records[record.rank] = record
    if place > mine.world_size:
        raise RendezvousError(
            f"{mine} came as number {place} to a world of {mine.world_size}, which is complete: "
            f"{', '.join(map(str, records.values()))}. Is another job using this store?"
        )
    return [records[rank] for rank in sorted(records)]


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
