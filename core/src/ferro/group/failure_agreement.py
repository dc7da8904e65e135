"""The agreement of all ranks of a group on the cause of its failure, so that all report the same.

The first rank that fails claims the verdict in the store, writes it and aborts the backend, which wakes the others. A
rank that fails afterwards, because it was woken or because a peer's connection closed, reads the verdict and raises
that error instead of its own symptom.

The verdict on a missed deadline, or on calls that differ, needs the other ranks: every rank that fails writes a report
of the call that it was in, and the claimant waits a moment for these reports before it writes the verdict. A rank that
leaves writes how it left, so that a rank that is done is not taken for one that died.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from ferro.errors import CollectiveMismatch, CollectiveTimeout, FerroError, GroupClosed, PeerLost, RendezvousError
from ferro.group import codec
from ferro.group.failure_report import CallSite, FailureReport
from ferro.group.group_info import GroupInfo, get_in_time
from ferro.group.timeout_diagnosis import diagnose

_REPORTS_S = 2.0  # how long the claimant waits for the others' reports, which are slow on a busy machine
_VERDICT_S = 5.0  # how long the others wait for the verdict
_MAX_CHARACTERS = 8192
_MAX_REASON = 500
_DEAD = "The group can no longer be used."
_SAME_CALLS = "Make every rank issue the same calls in the same order, with the same dtype, size, reduction and root"


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
        own = FailureReport.of(site, error)
        try:
            self._store.set(f"report/{self._rank}", own.encode())
            if self._store.add("claims", 1) > 1:
                abort()
                data = self._store.get("verdict", deadline=time.monotonic() + _VERDICT_S)
                return FailureVerdict(*codec.decode(data)).error(site, self._info, self._rank)  # type: ignore[misc]
            needs_reports = site.missed_deadline(error) or isinstance(error, CollectiveMismatch)
            if needs_reports:
                abort()  # makes the others write their reports
            verdict = (
                self._timeout(site, own, error) if site.missed_deadline(error) else self._symptom(error, site, own)
            )
            self._publish(verdict)
            if not needs_reports:
                abort()
        except Exception as reason:  # noqa: BLE001 - the group fails, whatever its store answers
            abort()  # without a store every rank knows only its own symptom, or that the store's host died
            verdict = self._store_lost(reason, site) or self._symptom(error, site, own, ask=False)
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

    def report_leaving(self, collectives: int, error: BaseException | None) -> None:
        """Tell the others how this rank leaves a group that works: because of an `error`, or in good order.

        A failure of another group that the program has handled is no reason, unless its error is what ends this rank.
        """
        reason, cause = "", None
        if isinstance(error, FerroError) and self._info.failures:
            reason, cause = self._info.failures[-1]
        elif error is not None:
            reason = f"{type(error).__name__}: {error}"[:_MAX_REASON]
        leaving = FailureReport(collectives=collectives, left=True, reason=reason, cause=cause)
        with suppress(RendezvousError, OSError):  # without a store the others notice closed connections only
            self._store.set(f"report/{self._rank}", leaving.encode())

    def _publish(self, verdict: FailureVerdict) -> None:
        text = verdict.text.encode(errors="replace").decode()[:_MAX_CHARACTERS]
        self._store.set("verdict", codec.encode(verdict._replace(text=text)))

    def _reports(self, ranks: Sequence[int], wait_s: float) -> dict[int, FailureReport]:
        """Read the reports of other ranks, those that come within `wait_s`."""
        deadline = time.monotonic() + wait_s
        return {rank: FailureReport.decode(get_in_time(self._store, f"report/{rank}", deadline)) for rank in ranks}

    def _timeout(self, site: CallSite, own: FailureReport, error: BaseException) -> FailureVerdict:
        """Find the ranks that were missing when the deadline of this rank's call passed."""
        reports = self._reports([r for r in range(len(self._info.hosts)) if r != self._rank], _REPORTS_S)
        found = diagnose(self._info, self._rank, own, reports)
        known = str(error).partition("the deadline passed. ")[2]  # what the backend knows besides
        text = f"{site.describe(self._info.name)} did not finish within {site.timeout_s:g} s; {found.finding}"
        text = f"{text}. {known}" if known else text
        text = f"{text}. {_DEAD} {found.remedy}."
        return FailureVerdict("CollectiveTimeout", text, arrived=found.arrived, missing=found.missing)

    def _symptom(self, error: BaseException, site: CallSite, own: FailureReport, *, ask: bool = True) -> FailureVerdict:
        """Describe an error with what this rank knows, and with the report of the rank that it is about."""
        peer = error.peer if isinstance(error, CollectiveMismatch | PeerLost) else None
        report = FailureReport()
        if ask and peer is not None:
            wait_s = _REPORTS_S if isinstance(error, CollectiveMismatch) else 0.0
            report = self._reports([peer], wait_s)[peer]
        if isinstance(error, CollectiveMismatch):
            return self._mismatch(error, site, own, report)
        where, rank, n = site.describe(self._info.name), self._rank, len(self._info.hosts)
        if isinstance(error, PeerLost) and peer is not None:
            return self._peer_lost(f"{where} failed", peer, error, site, report)
        if site.missed_deadline(error):
            text = (
                f"{where} did not finish within {site.timeout_s:g} s on rank {rank}, and the store could not be "
                f"reached to ask for the others. {_DEAD}"
            )
            return FailureVerdict("CollectiveTimeout", text, arrived=(rank,))
        text = f"{where} failed on rank {rank} of {n}: {type(error).__name__}: {error}. {_DEAD}"
        return FailureVerdict("GroupClosed", text)

    def _mismatch(
        self, error: CollectiveMismatch, site: CallSite, own: FailureReport, report: FailureReport
    ) -> FailureVerdict:
        """Describe two calls that differ, each with its line of the program where its rank reported it."""
        number, remedy = f" (#{site.call.seq})", _SAME_CALLS
        if site.peers:
            number, remedy = "", "Receive with the dtype and number of elements that are sent"
        calls = str(error)
        if report.label and report.label in calls:  # the label of the very call that the report is about
            # What helps where ranks gave one call other arguments does not where their programs made other calls.
            same_function = own.text.partition("(")[0] == report.text.partition("(")[0]
            hint = calls.rpartition(report.label)[2] if same_function else ""
            calls = f"rank {self._rank} called {own.text}; rank {error.peer} called {report.text}{hint}"
        text = f"ranks made different calls on group {self._info.name!r}{number}: {calls}"
        return FailureVerdict("CollectiveMismatch", f"{text}. {_DEAD} {remedy}.", error.peer)

    def _peer_lost(
        self, event: str, peer: int, error: Exception, site: CallSite, report: FailureReport
    ) -> FailureVerdict:
        """Describe a lost rank by the way in which it left: in good order, by an error of its own, or none known."""
        info, n = self._info, len(self._info.hosts)
        go_on = "or go on without it through shrink()"
        if report.left and not report.reason:
            here = f"this is number {site.call.seq + 1} here" if not site.peers else "this rank still waits for it"
            text = f"{event}: {info.describe(peer)} {report.how_it_left()}; {here}"
            remedy = f"Do the ranks have different numbers of batches? Give all the same, or see join(); {go_on}"
            return FailureVerdict("PeerLost", f"{text}. {_DEAD} {remedy}.", peer)
        if report.left:
            text = f"{event}: {info.describe(peer)} {report.how_it_left()}"
            if report.cause in info.global_ranks:  # the rank left because another one of this group was lost
                peer = info.global_ranks.index(report.cause)
        else:
            text = (
                f"{event}: {info.describe(peer)} of {n} is gone, noticed by rank {self._rank} after "
                f"{site.elapsed_s:.1f} s of {site.timeout_s:g} s ({error})"
            )
        remedy = f"Read {info.log_of(peer)} first; then restart the job, {go_on}"
        return FailureVerdict("PeerLost", f"{text}. {_DEAD} {remedy}.", peer)

    def _store_lost(self, reason: Exception, site: CallSite) -> FailureVerdict | None:
        """Name the rank that hosted the store as the lost one, if it died: all survivors reach this verdict alone."""
        from ferro.rendezvous.store.interface import StoreGone  # here, since it would slow down `import ferro`

        if not isinstance(reason, StoreGone) or reason.orderly or reason.peer is None:
            return None
        if reason.peer not in self._info.global_ranks:
            host = f"rank {reason.peer} of the world"
            text = f"{site.describe(self._info.name)} failed: {host}, which hosted the store, is gone. {_DEAD}"
            return FailureVerdict("PeerLost", f"{text} Read the log of {host} first.")
        peer = self._info.global_ranks.index(reason.peer)
        event = f"{site.describe(self._info.name)} failed"
        return self._peer_lost(event, peer, PeerLost("the store that it hosted ended"), site, FailureReport())
