"""load: a checkpoint into a state, by all ranks of a group, however many they are and however the state is sharded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from ferro import ProcessGroup
from ferro.errors import PeerLost
from ferro_checkpoint.arguments import check_group, check_timeout
from ferro_checkpoint.loading.load_checkpoint import load_checkpoint
from ferro_checkpoint.loading.names import Rename
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.plan.deadline import Deadline
from ferro_checkpoint.plan.failures import tell_all
from ferro_checkpoint.plan.lost_rank import note_loss
from ferro_checkpoint.progress import Progress
from ferro_checkpoint.storage.opening import split_path


def load(
    path: str | os.PathLike[str],
    into: Any = None,
    group: ProcessGroup | None = None,
    *,
    only: str | Iterable[str] | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    verify: bool = True,
    timeout_s: float = 600.0,
    progress: Progress | None = None,
) -> Any:
    """Load the checkpoint `path` into a state; all ranks of the group call it.

    The ranks may be more or fewer than those that saved it, and the state may be that of another strategy.

    Args:
        path: of the checkpoint's directory, as for `save`.
        into: a state as it is given to `save`, of which arrays and values are replaced by those of the checkpoint;
            arrays keep their memory. None returns all tensors as whole NumPy arrays.
        group: the ranks that have the state; None for this process alone.
        only: names of the state, their beginnings up to a dot ("model"), or patterns with "*": nothing else is loaded.
        rename: names in the checkpoint to names in the state: a dict of names or of their beginnings, or a function.
        strict: whether it is an error that the checkpoint lacks a name of the state, or has more.
        verify: whether the digests of all that is read are checked.
        timeout_s: seconds until an absent rank ends the load.
        progress: called with the bytes read so far and all bytes; a bar on the terminal of long loads if None.

    Returns:
        `into`; or, if that is None, a dict of the bundles, each a dict of its arrays, and the values.

    Raises:
        StateError: the checkpoint does not fit the state; nothing was changed.
        CheckpointIncomplete, CheckpointTooNew: it cannot be loaded; nothing was changed.
        CheckpointDamaged: it is not what was written. If that is found while arrays are read, the message says that
            some have changed: load another checkpoint before you go on.
    """
    check_group(group)
    check_timeout(timeout_s)
    own = (
        None if group is None or group.world_size == 1 else group.subgroup(range(group.world_size), timeout_s=timeout_s)
    )
    deadline = Deadline(timeout_s)
    opened: OpenedCheckpoint | None = None
    try:
        try:
            storage, name = split_path(path)
            opened = OpenedCheckpoint.open(storage, name, verify=verify)
        except Exception as error:
            tell_all(own, error, deadline)
            raise
        tell_all(own, None, deadline)
        return load_checkpoint(
            opened, into, own, only=only, rename=rename, strict=strict, timeout_s=deadline.left_s(), progress=progress
        )
    except PeerLost as error:
        note_loss(group, error, timeout_s)
        raise
    finally:
        if opened is not None:
            opened.close()
        if own is not None:
            own.close()
