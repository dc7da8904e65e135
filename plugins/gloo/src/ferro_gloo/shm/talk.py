"""What ranks say to each other, over their connections, to set shared memory up."""

from __future__ import annotations

import numpy as np

from ferro_gloo.tcp.backend import TcpBackend

_TAG = 1 << 33  # above every user's tag, and above those of `TcpBackend`


def swap(group: TcpBackend, mine: bytes, deadline: float) -> list[bytes]:
    """Give every rank `mine`, as long on all of them; return everybody's, by rank."""
    others = [rank for rank in range(group.world_size) if rank != group.rank]
    sent = np.frombuffer(mine, np.uint8)
    told = {rank: np.empty(len(mine), np.uint8) for rank in others}
    group.exchange(
        [(rank, sent) for rank in others], list(told.items()), tag=_TAG, deadline=deadline
    )
    return [
        mine if rank == group.rank else told[rank].tobytes() for rank in range(group.world_size)
    ]


def warn(text: str, consequence: str = "collectives go over TCP") -> None:
    """Tell the user why something takes the slow way."""
    import logging  # here, for it is slow to import and seldom needed

    logging.getLogger("ferro").warning("%s; %s", text, consequence)
