"""The roll call: every rank sees every rank's record before any connection exists.

Ranks that do not fit together (a rank twice, another world size, version, backend or set of
plugins) are an error on every rank, which names who differs.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ferro.errors import RendezvousError
from ferro.rendezvous.store.interface import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one rank says of itself.

    Attributes:
        rank, world_size: its place.
        host, pid: where it runs, for messages.
        address: its own address on the way to the store.
        version: its version of ferro.
        backend: the backend it is to use.
        plugins: entry point -> distribution and version of its plugins.
        settings: what else must be equal, in words.
        problem: why it cannot take part; "" when it can.
    """

    rank: int
    world_size: int
    host: str
    pid: int
    address: str
    version: str
    backend: str
    plugins: dict[str, str] = field(default_factory=dict)
    settings: str = ""
    problem: str = ""

    def who(self) -> str:
        """Return rank, host and process for messages."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def call_roll(store: Store, mine: Record, *, deadline: float) -> list[Record]:
    """Give this rank's record, wait for the others'; return all, by rank.

    Args:
        store: the job's store, prefixed for this roll call.
        mine: this rank's record.
        deadline: absolute `time.monotonic()` second.

    Raises:
        RendezvousError: ranks are missing, or do not fit together; says who.
    """
    started = time.monotonic()
    place = store.add("joined", 1)
    store.set(f"join/{place}", json.dumps(asdict(mine)).encode())
    records: list[Record] = []
    for number in range(1, mine.world_size + 1):
        try:
            raw = store.get(f"join/{number}", deadline=deadline)
        except TimeoutError as error:
            raise _absent(mine, records, time.monotonic() - started) from error
        record = _read(raw)
        _compare(records[0] if records else mine, record)
        _refuse_twice(records, record)
        records.append(record)
    if place > mine.world_size:
        raise RendezvousError(
            f"{mine.who()} came as number {place} to a world of {mine.world_size}, which is "
            f"complete: {', '.join(r.who() for r in records)}. Is another job using this store?"
        )
    return sorted(records, key=lambda record: record.rank)


def _read(raw: bytes) -> Record:
    """Read a record, also one by another version of ferro, which may have other fields."""
    said = json.loads(raw)
    blank: dict[str, Any] = {"rank": -1, "world_size": 0, "host": "?", "pid": 0, "address": ""}
    blank |= {"version": "unknown", "backend": ""}
    return Record(**blank | {f.name: said[f.name] for f in fields(Record) if f.name in said})


def _compare(reference: Record, record: Record) -> None:
    """Raise where two records do not fit together."""
    if record.problem:
        raise RendezvousError(f"{record.who()} cannot take part: {record.problem}")
    for name, what in _MUST_AGREE.items():
        theirs, ours = getattr(record, name), getattr(reference, name)
        if theirs != ours:
            raise RendezvousError(
                f"ranks differ in {what}: {record.who()} has {_difference(theirs, ours)}, but "
                f"{reference.who()} has {_difference(ours, theirs)}. Start all ranks alike: the "
                "same command, the same packages, the same arguments to ferro.init()."
            )


_MUST_AGREE = {
    "version": "the version of ferro",
    "world_size": "world size",
    "backend": "the backend",
    "plugins": "their plugins",
    "settings": "their settings",
}


def _difference(value: object, other: object) -> str:
    """Return a value for a message; of a table, only the entries that differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        own = {name: v for name, v in value.items() if other.get(name) != v}
        return ", ".join(f"{name} from {v}" for name, v in sorted(own.items())) or "none of these"
    return repr(value)


def _refuse_twice(records: list[Record], record: Record) -> None:
    for other in records:
        if other.rank == record.rank:
            raise RendezvousError(
                f"rank {record.rank} is there twice: pid {other.pid} on host {other.host} and "
                f"pid {record.pid} on host {record.host}. Give every process its own rank."
            )


def _absent(mine: Record, records: list[Record], seconds: float) -> RendezvousError:
    here = sorted(record.rank for record in records)
    missing = sorted(set(range(mine.world_size)) - set(here))
    return RendezvousError(
        f"after {seconds:.1f} s rank {mine.rank} still misses ranks {missing} of "
        f"{mine.world_size} (present: {here}). Check that they were started, that they reach "
        "ferro.init(), and read their logs; allow more time with timeout_s."
    )
