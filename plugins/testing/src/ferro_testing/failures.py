"""Conformance after failures: every rank raises the same cause within its deadline, and none hangs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ferro import ProcessGroup
from ferro.errors import CollectiveMismatch, CollectiveTimeout, FerroError, GroupClosed, PeerLost
from ferro.types import Array
from ferro_testing.case import Case, require
from ferro_testing.killing import DeathNoticedLate, end_this_rank, patience_s, require_survivors

_SHORT_S = 2.0  # long enough for ranks of a busy machine to make their calls
_WAKE_S = 8.0  # the deadline of a rank that another rank's abort should wake before


def check_mismatch(case: Case, kinds: Sequence[str] = ()) -> None:
    """Ranks that make different calls raise CollectiveMismatch, all with the same text.

    Args:
        case: the backend.
        kinds: the differences between the calls, such as "op" or "dtype", one run each; all when empty.
    """
    if case.largest < 2:
        return
    for kind, (needed, words) in _MISMATCHES.items():
        if kind in (kinds or _MISMATCHES) and case.supports("mismatch", *needed):
            reports = _rank_reports(case, _differ, kind)
            wanted = range(case.largest)
            _compare(reports, wanted, CollectiveMismatch, f"mismatch of {kind}", words)


def check_timeout(case: Case) -> None:
    """When a rank stays away, the others raise CollectiveTimeout, which names it."""
    if case.largest < 2 or not case.supports("timeout", "all_reduce", "subgroup", "barrier"):
        return
    absent = case.largest - 1
    reports = _rank_reports(case, _stay_away)
    _compare(reports, range(absent), CollectiveTimeout, "a rank that stays away", (str(absent),))
    for rank in range(absent):
        missing, seconds = reports[rank]["missing"], reports[rank]["seconds"]
        assert missing == [absent], f"rank {rank}: missing is {missing}, not [{absent}]"
        assert seconds == _SHORT_S, f"rank {rank}: seconds is {seconds}, not {_SHORT_S}"


def check_lost_peer(case: Case) -> None:
    """When a rank dies, the others raise PeerLost, which names it; its group is dead.

    Raises:
        DeathNoticedLate: all survivors named it correctly, but only after their deadline.
    """
    if case.largest < 2 or not case.supports("lost_peer", "all_reduce"):
        return
    victim = 1
    survivors = [rank for rank in range(case.largest) if rank != victim]
    reports = _rank_reports(case, _die, patience_s(case.timeout_s), lost=(victim,))
    late = [reports[rank].get("missing") == [victim] for rank in survivors]
    kind = CollectiveTimeout if all(late) else PeerLost
    _compare(reports, survivors, kind, "a rank that dies", (f"rank {victim} ",))
    if kind is CollectiveTimeout:
        raise DeathNoticedLate(f"a rank that dies, of {case.largest} of {case.backend}", victim)
    for rank in survivors:
        peer, later = reports[rank]["peer"], reports[rank]["later"]
        assert peer == victim, f"rank {rank}: peer is {peer}, not {victim}"
        assert later == GroupClosed.__name__, f"rank {rank}: the dead group raised {later}"


def check_abort(case: Case) -> None:
    """abort() on one rank ends the operations in which the others wait."""
    if case.largest < 2 or not case.supports("abort", "all_reduce"):
        return
    reports = _rank_reports(case, _abort, case.supports("subgroup", "barrier"))
    woken = range(1, case.largest)
    _compare(reports, woken, GroupClosed, "abort()", ("aborted", "rank 0"))
    for rank in woken:
        waited_s = reports[rank]["waited_s"]
        assert waited_s < _WAKE_S, f"abort(): rank {rank} was not woken: it waited {waited_s:.1f} s"


_MISMATCHES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "op": (("all_reduce", "all_gather"), ("all_reduce", "all_gather")),
    "dtype": (("all_reduce",), ("float32", "float64")),
    "shape": (("all_reduce",), ("4x3", "3x4")),
    "size": (("all_gather",), ("4 x float32", "5 x float32")),
    "reduction": (("all_reduce",), ("op=sum", "op=max")),
    "root": (("broadcast",), ("root=0", "root=1")),
    "transfer": (("send", "recv", "all_reduce"), ("3 x float32", "4 x float32")),
    "repeated": (("all_reduce",), ("op=sum", "op=max")),
    "persistent": (("all_reduce", "barrier"), ("shape 4", "shape 5")),
    "step": (("all_reduce", "barrier"), ("persistent 1", "persistent 2")),
    "exchange": (("sendrecv", "all_gather"), ("4 x float32", "nothing")),
}


def _differ(group: ProcessGroup, kind: str) -> dict[str, Any]:
    """Make a call that differs on the last rank."""
    odd = group.rank == group.world_size - 1
    plain = np.ones(4, np.float32)
    calls: dict[str, Callable[[], object]] = {
        "op": lambda: group.all_gather(plain) if odd else group.all_reduce(plain),
        "dtype": lambda: group.all_reduce(np.ones(4, np.float64) if odd else plain),
        "shape": lambda: group.all_reduce(np.ones((3, 4) if odd else (4, 3))),
        "size": lambda: group.all_gather(np.ones(5, np.float32) if odd else plain),
        "reduction": lambda: group.all_reduce(plain, "max" if odd else "sum"),
        "root": lambda: group.broadcast(plain, 1 if odd else 0),
        "transfer": lambda: _differ_in_transfer(group, odd),
        "repeated": lambda: [group.all_reduce(plain, "max" if odd and call == 4 else "sum") for call in range(5)],
        "persistent": lambda: group.persistent("all_reduce", np.ones(5, np.float32) if odd else plain),
        "step": lambda: _differ_in_step(group, odd, plain),
        "exchange": lambda: group.persistent("exchange", [((group.rank + 1) % group.world_size, plain)], []),
    }
    return _failed(group, calls[kind])


def _differ_in_step(group: ProcessGroup, odd: bool, x: Array) -> object:
    """Run a step of one persistent operation where the others run one of another that looks the same."""
    first, second = group.persistent("all_reduce", x), group.persistent("all_reduce", x)
    first()
    return (second if odd else first)()


def _differ_in_transfer(group: ProcessGroup, odd: bool) -> object:
    """Send three elements to a rank that expects four; the others wait for both."""
    if odd:
        group.recv(np.empty(4, np.float32), 0)
    elif group.rank == 0:
        group.send(np.ones(3, np.float32), group.world_size - 1)
    return group.all_reduce(np.ones(2))


def _stay_away(group: ProcessGroup) -> dict[str, Any]:
    """Leave the last rank out of an all_reduce, until the others have failed."""
    last = group.world_size - 1
    side = group.subgroup([0, last]) if group.rank in (0, last) else None
    if group.rank == last:
        assert side is not None
        group.all_reduce(np.ones(3))
        with contextlib.suppress(FerroError):  # rank 0 calls it, too, or has ended
            side.barrier()
        return {}
    report = _failed(group, lambda: group.all_reduce(np.ones(3), timeout_s=_SHORT_S))
    if side is not None:
        with contextlib.suppress(FerroError):  # it may have died along with the group
            side.barrier()
    return report


def _die(group: ProcessGroup, allowed_s: float) -> dict[str, Any]:
    """Let rank 1 die between two operations."""
    if group.rank == 1:
        group.all_reduce(np.ones(3))
        end_this_rank()
    return _failed(group, lambda: group.all_reduce(np.ones(3), timeout_s=allowed_s), allowed_s)


def _abort(group: ProcessGroup, stay: bool) -> dict[str, Any]:
    """Abort on rank 0 while the others wait for it.

    With `stay`, rank 0 leaves only after they have been woken, since its end would wake them as well.
    """
    side = group.subgroup(range(group.world_size)) if stay else None
    report: dict[str, Any] = {}
    if group.rank == 0:
        group.all_reduce(np.ones(3))
        group.abort()
    else:
        report = _failed(group, lambda: group.all_reduce(np.ones(3), timeout_s=_WAKE_S))
    if side is not None:
        with contextlib.suppress(FerroError):  # it may have died along with the group
            side.barrier(timeout_s=2 * _WAKE_S)
    return report


def _failed(group: ProcessGroup, call: Callable[[], object], timeout_s: float | None = None) -> dict[str, Any]:
    """Make a correct call, then a call that is to fail; return the error as plain values.

    A rank may still be in the first call, which has `timeout_s`, when another has failed in the
    second; that error counts, too.
    """
    started = time.monotonic()
    try:
        group.all_reduce(np.ones(3), timeout_s=timeout_s)
        started = time.monotonic()
        call()
    except FerroError as error:
        waited_s = time.monotonic() - started
        later = ""
        try:
            group.all_reduce(np.ones(1))
        except FerroError as next_error:
            later = type(next_error).__name__
        return {
            "error": type(error).__name__,
            "text": str(error),
            "peer": error.peer,
            "missing": list(getattr(error, "missing", ())),
            "seconds": getattr(error, "seconds", None),
            "later": later,
            "waited_s": waited_s,
        }
    return {"error": "nothing", "text": ""}


def _rank_reports(
    case: Case, function: Callable[..., object], *args: object, lost: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """Run a function on the largest world; return the result of each rank, {} for a lost one."""
    outcomes = case.outcomes(function, case.largest, *args)
    what = f"{function.__name__} on {case.largest} ranks of {case.backend}"
    if lost:
        require_survivors(what, outcomes, lost)
    require(what, outcomes, lost)
    reports: list[dict[str, Any]] = []
    for outcome in outcomes:
        result = {} if outcome.rank in lost else outcome.result
        assert isinstance(result, dict), f"{what}: rank {outcome.rank} tells {result!r}"
        reports.append(result)
    return reports


def _compare(
    reports: Sequence[dict[str, Any]], ranks: Sequence[int], kind: type[FerroError], what: str, words: Sequence[str]
) -> None:
    """Check that these ranks raised one kind of error with one text, which has these words."""
    for rank in ranks:
        error, text = reports[rank]["error"], reports[rank]["text"]
        assert error == kind.__name__, f"{what}: rank {rank} raised {error}: {text}"
        for word in words:
            assert word in text, f"{what}: rank {rank} does not name {word!r}: {text}"
    texts = {reports[rank]["text"] for rank in ranks}
    assert len(texts) == 1, f"{what}: ranks tell different causes: {sorted(texts)}"
