"""Blame: what went wrong on a route's group of two ranks, told in ranks of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ferro import CollectiveTimeout, GroupClosed, PeerLost

from .line import Line
from .routes import Route


@contextmanager
def blaming(route: Route, line: Line, microbatch: int) -> Iterator[None]:
    """Let errors of a transfer name ranks as the user knows them. Not to be nested.

    Args:
        route: along which.
        line: its end here.
        microbatch: which is sent, or waited for.

    Raises:
        CollectiveTimeout: the transfer took too long.
        PeerLost: the rank at an end of the route has gone.
    """
    try:
        yield
    except (CollectiveTimeout, PeerLost, GroupClosed) as error:
        # Once the group has died of an earlier transfer, that is what is to be told.
        cause = error.__cause__ if isinstance(error, GroupClosed) else error
        what = f"Pipeline on group {line.pipeline!r}: the {route}, microbatch {microbatch}, "
        way = f"from rank {route.source} to rank {route.target}"
        if isinstance(cause, CollectiveTimeout):
            raise _late(cause, route, line, f"{what}did not come {way}") from error
        if isinstance(cause, PeerLost):
            raise _lost(cause, route, line, f"{what}cannot come {way}") from error
        raise


def _late(error: CollectiveTimeout, route: Route, line: Line, what: str) -> CollectiveTimeout:
    ends = (route.source, route.target)
    here, peer = line.group.rank, 1 - line.group.rank
    # Of both ends, one that nothing is heard of counts as missing.
    missing = error.missing or (() if peer in error.arrived else (peer,))
    if missing:
        told = f"did not arrive: rank {ends[missing[0]]}"
        remedy = f"Read the log of rank {ends[missing[0]]} first"
    else:
        told = "both ranks were there"
        remedy = "Raise timeout_s, or look for a slow or broken link"
    within = "in time" if error.seconds is None else f"within {error.seconds:g} s"
    return CollectiveTimeout(
        f"{what} {within}; {told}. The pipeline can no longer be used. {remedy}.",
        op=error.op,
        group=line.pipeline,
        rank=ends[here],
        peer=ends[peer],
        seq=error.seq,
        seconds=error.seconds,
        arrived=[ends[end] for end in error.arrived],
        missing=[ends[end] for end in missing],
    )


def _lost(error: PeerLost, route: Route, line: Line, what: str) -> PeerLost:
    ends = (route.source, route.target)
    gone = ends[1 - line.group.rank if error.peer is None else error.peer]
    host = "" if error.host is None else f" (host {error.host})"
    return PeerLost(
        f"{what}: rank {gone}{host} is gone. The pipeline can no longer be used. "
        f"Read rank {gone}'s log first; then restart the job.",
        op=error.op,
        group=line.pipeline,
        rank=ends[line.group.rank],
        peer=gone,
        host=error.host,
    )
