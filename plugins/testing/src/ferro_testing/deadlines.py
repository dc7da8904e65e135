"""Conformance of the deadline of a send that nobody receives."""

from __future__ import annotations

import contextlib
import time

import numpy as np

from ferro import ProcessGroup
from ferro.errors import CollectiveTimeout, FerroError
from ferro_testing.case import Case, require
from ferro_testing.killing import patience_s

_SHORT_S = 0.5
_NBYTES = 64 << 20  # more than sockets, pipes and libraries buffer


def check_send_deadline(case: Case) -> None:
    """A send that nobody receives ends by its deadline: with CollectiveTimeout, or buffered."""
    if case.largest < 2 or not case.supports("timeout", "send", "subgroup", "barrier"):
        return
    allowed_s = patience_s(case.timeout_s)
    outcomes = case.outcomes(_send_unreceived, case.largest, allowed_s)
    what = f"a send that nobody receives, on {case.largest} ranks of {case.backend}"
    require(what, outcomes)
    told = outcomes[0].result
    assert isinstance(told, list), f"{what}: rank 0 tells {told!r}"
    error, text, waited_s = told
    assert waited_s < allowed_s, (
        f"{what}: it took {waited_s:.1f} s, with timeout_s={_SHORT_S}: does `send` wait by its "
        "`deadline`?" + (f" ({text})" if text else "")
    )
    assert error in ("", CollectiveTimeout.__name__), f"{what}: rank 0 raised {error}: {text}"


def _send_unreceived(group: ProcessGroup, allowed_s: float) -> list[object]:
    """Send from rank 0 to the last, which does not receive; return error, text and seconds.

    All ranks stay until the send has ended: the end of the receiver would end it as well.
    """
    side = group.subgroup(range(group.world_size))
    assert side is not None
    told: list[object] = []
    if group.rank == 0:
        kind = text = ""
        started = time.monotonic()
        try:
            group.send(np.zeros(_NBYTES, np.uint8), group.world_size - 1, timeout_s=_SHORT_S)
        except FerroError as error:
            kind, text = type(error).__name__, str(error)
        told = [kind, text, time.monotonic() - started]
    with contextlib.suppress(FerroError):  # it may have died along with the group
        side.barrier(timeout_s=2 * allowed_s)
    return told
