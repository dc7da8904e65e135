"""The diagnosis of a missed deadline: which ranks were truly missing, and what to do.

A rank that waits in a call says so in its report, and names the ranks that it waited for where its backend knows them.
Following these waits from the rank whose deadline passed leads to the ranks that keep all the others: those that are in
no call of the group, or in another one. A circle of waits is a deadlock of the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ferro.group.failure_report import FailureReport
from ferro.group.group_info import GroupInfo

_ROOTED = ("broadcast", "scatter", "reduce", "gather")  # a rank may be done with these before others have come


class Diagnosis(NamedTuple):
    """The ranks that arrived in a call, those that were missing, and the words for it."""

    arrived: list[int]
    missing: list[int]
    finding: str
    remedy: str


def diagnose(info: GroupInfo, rank: int, own: FailureReport, reports: Mapping[int, FailureReport]) -> Diagnosis:
    """Diagnose the missed deadline of `rank`, with the reports of all other ranks."""
    reports = {**reports, rank: own}
    if own.peers:
        missing, waiting = _follow_transfers(rank, reports)
    else:
        missing, waiting = _absent_from_collective(rank, reports), []
    if missing:
        taking_part = {rank, *own.peers} if own.peers else set(reports)
        known = {r for r in taking_part if r == rank or reports[r].text or reports[r].left}
        arrived = sorted(known.difference(missing))  # a silent rank may have been done, or not have come
        finding = (
            f"arrived: rank {', '.join(map(str, arrived))}; "
            f"did not arrive: {', '.join(_describe_absent(info, absent, reports[absent]) for absent in missing)}"
        )
        silent = [absent for absent in missing if not reports[absent].text]
        return Diagnosis(arrived, missing, finding, f"Read {info.log_of((silent or missing)[0])} first")
    if own.peers and not _is_partner(own, rank, reports[own.peers[0]]):
        return _deadlock(rank, own, waiting, reports)
    arrived = sorted({rank, *own.peers}) if own.peers else sorted(reports)
    return Diagnosis(arrived, [], "all ranks were there", "Raise timeout_s, or look for a slow or broken link")


def _absent_from_collective(rank: int, reports: Mapping[int, FailureReport]) -> list[int]:
    """List the ranks that had not entered the collective of `rank`.

    A silent rank may have done its part of a rooted collective and gone on. It is listed only if another rank waited
    for it, where that is known. A rank that waits in an earlier step is not what keeps the others, if one is known.
    """
    own = reports[rank]
    absent = [r for r, report in reports.items() if r != rank and not _has_entered(report, own)]
    if own.op in _ROOTED and own.awaited:
        awaited, pending = {rank}, [rank]
        while pending:
            for other in reports[pending.pop()].awaited:
                if other not in awaited:
                    awaited.add(other)
                    pending.append(other)
        absent = [r for r in absent if (r in awaited or reports[r].text) and not reports[r].awaited] or absent
    return sorted(absent)


def _has_entered(report: FailureReport, own: FailureReport) -> bool:
    """Say whether a rank had entered the collective of `own`, or was further ahead."""
    if report.text and not report.peers:
        return report.seq > own.seq or (report.seq, report.op) == (own.seq, own.op)
    return report.collectives > own.seq


def _follow_transfers(rank: int, reports: Mapping[int, FailureReport]) -> tuple[list[int], list[int]]:
    """Follow the waits of transfers from `rank`; list the ranks that wait for nobody, and the ranks in between."""
    missing, waiting, pending = [], [], [rank]
    while pending:
        waiting.append(pending.pop(0))
        report = reports[waiting[-1]]
        for other in report.awaited or report.peers:
            if other in missing or other in waiting or other in pending:
                continue
            if reports[other].peers:
                pending.append(other)
            else:
                missing.append(other)
    return sorted(missing), waiting


def _is_partner(own: FailureReport, rank: int, other: FailureReport) -> bool:
    """Say whether the other rank was in the other half of this rank's transfer."""
    directions = {"send": {"recv", "sendrecv"}, "recv": {"send", "sendrecv"}, "sendrecv": {"send", "recv", "sendrecv"}}
    return rank in other.peers and other.op in directions[own.op]


def _describe_absent(info: GroupInfo, rank: int, report: FailureReport) -> str:
    if report.left:
        return f"{info.describe(rank)}, which {report.how_it_left()}"
    return info.describe(rank) + (f", which was in {report.text}" if report.text else "")


def _deadlock(rank: int, own: FailureReport, waiting: list[int], reports: Mapping[int, FailureReport]) -> Diagnosis:
    """Describe a circle of ranks that wait for each other."""
    calls = "; ".join(f"rank {r} was in {reports[r].text}" for r in waiting)
    both = {reports[r].op for r in waiting}
    what = {"send": "all of these ranks are sending", "recv": "all of these ranks are receiving"}.get(
        both.pop() if len(both) == 1 else "", "these ranks wait for each other"
    )
    if len(waiting) == 2:
        what = what.replace("all of these", "both")
    remedy = "Use sendrecv, or async_op=True and wait(), or let one of them receive first"
    return Diagnosis(sorted({rank, *own.peers}), [], f"deadlock: {what}: {calls}", remedy)
