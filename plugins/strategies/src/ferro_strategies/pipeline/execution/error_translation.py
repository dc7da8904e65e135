"""Error translation: make errors of an edge's two-rank group name the pipeline's ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ferro import CollectiveTimeout, GroupClosed, PeerLost

from .channel import StageChannel
from .plan import Edge


@contextmanager
def translated_errors(edge: Edge, channel: StageChannel, microbatch: int) -> Iterator[None]:
    """Translate the errors of a transfer, so that they name ranks of the pipeline. Do not nest it.

    Args:
        edge: the edge along which the transfer goes.
        channel: this rank's end of it.
        microbatch: the number of the microbatch that is sent or awaited.

    Raises:
        CollectiveTimeout: the transfer took too long.
        PeerLost: the rank at an end of the edge has gone.
    """
    try:
        yield
    except (CollectiveTimeout, PeerLost, GroupClosed) as error:
        # If the group has died of an earlier transfer, the error of that transfer is translated.
        cause = error.__cause__ if isinstance(error, GroupClosed) else error
        subject = f"Pipeline on group {channel.pipeline!r}: the {edge}, microbatch {microbatch}, "
        path = f"from rank {edge.source} to rank {edge.target}"
        if isinstance(cause, CollectiveTimeout):
            raise _timeout(cause, edge, channel, f"{subject}did not come {path}") from error
        if isinstance(cause, PeerLost):
            raise _peer_lost(cause, edge, channel, f"{subject}cannot come {path}") from error
        raise


def _timeout(error: CollectiveTimeout, edge: Edge, channel: StageChannel, event: str) -> CollectiveTimeout:
    ranks = (edge.source, edge.target)
    here, peer = channel.group.rank, 1 - channel.group.rank
    # A peer from which nothing was heard counts as missing.
    missing = error.missing or (() if peer in error.arrived else (peer,))
    if missing:
        reason = f"did not arrive: rank {ranks[missing[0]]}"
        remedy = f"Read the log of rank {ranks[missing[0]]} first"
    else:
        reason = "both ranks were there"
        remedy = "Raise timeout_s, or look for a slow or broken link"
    within = "in time" if error.seconds is None else f"within {error.seconds:g} s"
    return CollectiveTimeout(
        f"{event} {within}; {reason}. The pipeline can no longer be used. {remedy}.",
        op=error.op,
        group=channel.pipeline,
        rank=ranks[here],
        peer=ranks[peer],
        seq=error.seq,
        seconds=error.seconds,
        arrived=[ranks[end] for end in error.arrived],
        missing=[ranks[end] for end in missing],
    )


def _peer_lost(error: PeerLost, edge: Edge, channel: StageChannel, event: str) -> PeerLost:
    ranks = (edge.source, edge.target)
    gone = ranks[1 - channel.group.rank if error.peer is None else error.peer]
    host = "" if error.host is None else f" (host {error.host})"
    return PeerLost(
        f"{event}: rank {gone}{host} is gone. The pipeline can no longer be used. "
        f"Read rank {gone}'s log first; then restart the job.",
        op=error.op,
        group=channel.pipeline,
        rank=ranks[channel.group.rank],
        peer=gone,
        host=error.host,
    )
