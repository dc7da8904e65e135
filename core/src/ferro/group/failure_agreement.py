"""The agreement of all ranks of a group on the cause of its failure, so that all report the same.

The first rank that fails claims the verdict in the store, writes it and aborts the backend, which wakes the others. A
rank that fails afterwards, because it was woken or because a peer's connection closed, reads the verdict and raises
that error instead of its own symptom.

The verdict on a missed deadline needs the other ranks: every rank that fails writes a record of the call that it was
in, and the claimant waits a moment for these records before it writes the verdict. A rank without a record had not
arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ferro.collectives.label import Call
from ferro.errors import CollectiveMismatch, CollectiveTimeout, FerroError, GroupClosed, PeerLost, RendezvousError
from ferro.group import codec
from ferro.group.group_info import GroupInfo, get_in_time

_RECORDS_S = 1.0  # how long the claimant of a timeout waits for the others' records
_VERDICT_S = 5.0  # how long the others wait for the verdict
_MAX_CHARACTERS = 8192
_CLOCK_S = 0.01  # how much too early a backend may notice a deadline
_DEAD = "The group can no longer be used."
_SAME_CALLS = "Make every rank issue the same calls in the same order, with the same dtype, size, reduction and root"


@dataclass(frozen=True, slots=True)
class CallSite:
    """The call on this rank in which a failure was noticed."""

    call: Call
    peers: tuple[int, ...]  # the other ranks of a transfer; () for a collective, in which all take part
    timeout_s: float
    elapsed_s: float
    messages: str = ""  # of a transfer: how many bytes move to or from which rank

    def missed_deadline(self, error: BaseException) -> bool:
        """Say whether an error is the backend's for a missed deadline, and not a TimeoutError of the program's own."""
        return isinstance(error, TimeoutError) and self.elapsed_s >= self.timeout_s - _CLOCK_S

    def record(self) -> str:
        """Format the call and its number as the record that other ranks read."""
        return f"{self.call.op} #{self.call.seq}" + (f" ({self.messages})" if self.messages else "")

    def is_same_operation(self, record: str) -> bool:
        """Say whether a rank with this record was in the same operation."""
        if self.peers:  # the two ends of a transfer have names and numbers of their own
            return record.startswith(("send", "recv"))
        return record == self.record()

    def is_deadlock(self, record: str, rank: int) -> bool:
        """Say whether the peer with this record waits for `rank` to do what `rank` itself waits to do."""
        return self.call.op in ("send", "recv") and record.startswith(self.call.op) and f" rank {rank}," in record

    def describe(self, group: str) -> str:
        if self.peers:
            return f"{self.call.op} with rank {self.peers[0]} on group {group!r}"
        return f"{self.record()} on group {group!r}"


class FailureVerdict(NamedTuple):
    """The cause of a group's failure, as it is written to the store."""

    kind: str  # name of the error class
    text: str
    peer: int | None = None  # the rank that a PeerLost or CollectiveMismatch is about
    arrived: Sequence[int] = ()  # ranks known to have entered the call that timed out
    missing: Sequence[int] = ()

    def error(self, site: CallSite, info: GroupInfo, rank: int) -> FerroError:
        """Make the error that `rank` raises, with its own call site."""
        kinds: tuple[type[FerroError], ...] = (CollectiveMismatch, CollectiveTimeout, PeerLost)
        kind = next((kind for kind in kinds if kind.__name__ == self.kind), GroupClosed)
        error = kind(self.text, op=site.call.op, group=info.name, rank=rank, peer=self.peer)
        if isinstance(error, PeerLost) and error.peer is not None:
            error.host = info.hosts[error.peer]
        elif isinstance(error, CollectiveTimeout):
            error.seq, error.seconds = site.call.seq, site.timeout_s
            error.peer = site.peers[0] if site.peers else None
            error.arrived, error.missing = tuple(self.arrived), tuple(self.missing)
        return error


class FailureAgreement:
    """Agrees on the cause of a group's failure through the group's store."""

    def __init__(self, info: GroupInfo, rank: int) -> None:
        self._store = info.store.prefix("failure")
        self._info = info
        self._rank = rank

    def agree(self, error: BaseException, site: CallSite, abort: Callable[[], None]) -> FerroError:
        """Agree with the other ranks on the cause of the backend's `error`; return the error that this rank raises.

        `abort` ends the backend's calls on all ranks; it is called as soon as the others may ask for the verdict.
        """
        try:
            self._store.set(f"call/{self._rank}", site.record().encode())
            if self._store.add("claims", 1) > 1:
                abort()
                data = self._store.get("verdict", deadline=time.monotonic() + _VERDICT_S)
                return FailureVerdict(*codec.decode(data)).error(site, self._info, self._rank)  # type: ignore[misc]
            timed_out = site.missed_deadline(error)
            if timed_out:
                abort()  # makes the others write their records
            verdict = self._timeout(site) if timed_out else self._symptom(error, site)
            self._publish(verdict)
            if not timed_out:
                abort()
        except Exception:  # noqa: BLE001 - the group fails, whatever its store answers
            abort()  # without a store every rank knows only its own symptom
            verdict = self._symptom(error, site)
        return verdict.error(site, self._info, self._rank)

    def report(self, kind: type[FerroError], event: str) -> None:
        """Write the verdict of a group that this rank itself ends; `event` says how."""
        text = f"group {self._info.name!r} {event} by {self._info.describe(self._rank)}"
        peer = self._rank if kind is PeerLost else None
        try:
            if self._store.add("claims", 1) == 1:
                self._publish(FailureVerdict(kind.__name__, text, peer))
        except (RendezvousError, OSError):
            return  # the others notice closed connections

    def _publish(self, verdict: FailureVerdict) -> None:
        text = verdict.text.encode(errors="replace").decode()[:_MAX_CHARACTERS]
        self._store.set("verdict", codec.encode(verdict._replace(text=text)))

    def _timeout(self, site: CallSite) -> FailureVerdict:
        """Find the ranks that arrived; a rank that was in another call has not arrived, and its call is named."""
        others = site.peers or [r for r in range(len(self._info.hosts)) if r != self._rank]
        deadline = time.monotonic() + _RECORDS_S
        records = {rank: get_in_time(self._store, f"call/{rank}", deadline).decode() for rank in others}
        missing = [rank for rank in others if not site.is_same_operation(records[rank])]
        arrived = sorted({self._rank, *others}.difference(missing))
        if missing:
            absent = [
                self._info.describe(rank) + (f", which was in {records[rank]}" if records[rank] else "")
                for rank in missing
            ]
            finding = f"arrived: rank {', '.join(map(str, arrived))}; did not arrive: {', '.join(absent)}"
            silent = [rank for rank in missing if not records[rank]]
            remedy = f"Read the log of rank {(silent or missing)[0]} first"
        elif site.peers and site.is_deadlock(record := records[site.peers[0]], self._rank):
            both = "sending" if site.call.op == "send" else "receiving"
            finding = (
                f"deadlock: both ranks are {both}; use sendrecv, or async_op=True. Rank {self._rank} was in "
                f"{site.record()}, rank {site.peers[0]} in {record}"
            )
            remedy = "With sendrecv neither waits for the other"
        else:
            finding = "all ranks were there"
            remedy = "Raise timeout_s, or look for a slow or broken link"
        text = f"{site.describe(self._info.name)} did not finish within {site.timeout_s:g} s; {finding}"
        return FailureVerdict("CollectiveTimeout", f"{text}. {_DEAD} {remedy}.", arrived=arrived, missing=missing)

    def _symptom(self, error: BaseException, site: CallSite) -> FailureVerdict:
        """Describe an error with what this rank alone knows."""
        rank, name, n = self._rank, self._info.name, len(self._info.hosts)
        if isinstance(error, CollectiveMismatch):
            number, remedy = f" (#{site.call.seq})", _SAME_CALLS
            if site.peers:
                number, remedy = "", "Receive with the dtype and number of elements that are sent"
            text = f"ranks made different calls on group {name!r}{number}: {error}"
            return FailureVerdict("CollectiveMismatch", f"{text}. {_DEAD} {remedy}.", error.peer)
        where = site.describe(name)
        if isinstance(error, PeerLost) and error.peer is not None:
            text = (
                f"{where} failed: {self._info.describe(error.peer)} of {n} is gone, noticed by rank {rank} after "
                f"{site.elapsed_s:.1f} s of {site.timeout_s:g} s ({error})"
            )
            remedy = f"Read rank {error.peer}'s log first; then restart the job, or go on without it through shrink()"
            return FailureVerdict("PeerLost", f"{text}. {_DEAD} {remedy}.", error.peer)
        if site.missed_deadline(error):
            text = (
                f"{where} did not finish within {site.timeout_s:g} s on rank {rank}, and the store could not be "
                f"reached to ask for the others. {_DEAD}"
            )
            return FailureVerdict("CollectiveTimeout", text, arrived=(rank,))
        text = f"{where} failed on rank {rank} of {n}: {type(error).__name__}: {error}. {_DEAD}"
        return FailureVerdict("GroupClosed", text)
