"""What a checkpointer tells of other ranks that are gone or do not come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ferro.errors import CollectiveTimeout, PeerLost
from ferro_checkpoint.plan.lost_rank import note_loss

if TYPE_CHECKING:
    from ferro import ProcessGroup


@contextlib.contextmanager
def told_to(group: ProcessGroup | None, timeout_s: float) -> Iterator[None]:
    """Let PeerLost that is raised within the block end `group`, as `note_loss`."""
    try:
        yield
    except CollectiveTimeout as error:
        error.add_note(
            "(all ranks call step() and the other methods of a Checkpointer alike: has one left out a call?)"
        )
        raise
    except PeerLost as error:
        note_loss(group, error, timeout_s)
        raise
