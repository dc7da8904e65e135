"""The loss of a rank that a sub-group for checkpoints has noticed: the training's group learns of it, too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ferro import FerroError
from ferro.errors import CollectiveTimeout, PeerLost

if TYPE_CHECKING:
    from ferro import ProcessGroup

_TAG = 2**31 - 1  # no message has it
_MOST_WAIT_S = 5.0


def note_loss(group: ProcessGroup | None, error: BaseException, timeout_s: float) -> None:
    """Let PeerLost, which another group of the same ranks has raised, end `group` as well; do nothing for other errors.

    `group.shrink()` works only on a group that has noticed the loss itself. So this rank waits there for a message of
    the lost one, which is the same error on all ranks of the group, whatever they are doing in it.
    """
    if not isinstance(error, PeerLost) or error.peer is None or group is None:
        return
    if group.state == "open" and error.peer != group.rank:
        with contextlib.suppress(FerroError):
            group.recv(np.zeros(1, np.uint8), error.peer, _TAG, timeout_s=min(timeout_s, _MOST_WAIT_S))


@contextlib.contextmanager
def told_to(group: ProcessGroup | None, timeout_s: float) -> Iterator[None]:
    """Let PeerLost that is raised within the block end `group`, as `note_loss`."""
    try:
        yield
    except CollectiveTimeout as error:
        error.add_note("(all ranks call step() and the other methods of a Checkpointer alike: was a call left out?)")
        raise
    except PeerLost as error:
        note_loss(group, error, timeout_s)
        raise
