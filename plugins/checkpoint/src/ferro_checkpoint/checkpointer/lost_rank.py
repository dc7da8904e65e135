"""The loss of a rank that a checkpointer's own groups have noticed: the training's group learns of it, too."""

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


@contextlib.contextmanager
def told_to(group: ProcessGroup | None, timeout_s: float) -> Iterator[None]:
    """Let PeerLost, which another group of the same ranks raises within the block, end `group` as well.

    `group.shrink()` works only on a group that has noticed the loss itself. So this rank waits there for a message of
    the lost one, which is the same error on all ranks of the group, whatever they are doing in it.
    """
    try:
        yield
    except CollectiveTimeout as error:
        error.add_note(
            "(all ranks call step() and the other methods of a Checkpointer alike: has one left out a call?)"
        )
        raise
    except PeerLost as error:
        if group is not None and group.state == "open" and error.peer is not None and error.peer != group.rank:
            with contextlib.suppress(FerroError):
                group.recv(np.zeros(1, np.uint8), error.peer, _TAG, timeout_s=min(timeout_s, _MOST_WAIT_S))
        raise
