"""save: a state as a checkpoint, by all ranks of a group."""

from __future__ import annotations

import os

from ferro import ProcessGroup
from ferro.errors import CollectiveTimeout, GroupClosed, PeerLost, RendezvousError
from ferro_checkpoint.arguments import check_group, check_timeout, checked_step
from ferro_checkpoint.errors import SaveFailed, save_failed
from ferro_checkpoint.plan.lost_rank import note_loss
from ferro_checkpoint.plan.replica_check import Check
from ferro_checkpoint.progress import Progress, byte_progress
from ferro_checkpoint.saving.save_plan import plan_save
from ferro_checkpoint.saving.write import write_checkpoint
from ferro_checkpoint.storage.opening import split_path


def save(
    path: str | os.PathLike[str],
    state: object,
    group: ProcessGroup | None = None,
    *,
    step: int | None = None,
    overwrite: bool = False,
    check_replicas: Check = "sampled",
    timeout_s: float = 600.0,
    progress: Progress | None = None,
) -> None:
    """Save a state as the directory `path`; all ranks of the group call it.

    The directory appears when it is whole and on disk. If anything fails on any rank, nothing appears.

    Args:
        path: of the checkpoint's directory: a path, or an address that fsspec knows, such as "s3://bucket/step-5".
        state: a nested dict of arrays (NumPy, CuPy, DLPack), modules, optimizers and tensors of any strategy, objects
            with `state_dict()`, random generators, numbers, texts; or one module. Arrays that are no strategy's are the
            same on every rank.
        group: the ranks that have the state; None for this process alone. The save has a sub-group of its own, so that
            other operations of the group may be under way.
        step: the training's step, by which checkpoints are ordered.
        overwrite: whether a checkpoint at `path` is replaced, when the new one is whole.
        check_replicas: how arrays that several ranks hold are compared: "sampled" (their beginning, middle and end),
            "all", or "none".
        timeout_s: seconds until an absent rank ends the save.
        progress: called with the bytes written so far and all bytes; a bar on the terminal of long saves if None.

    Raises:
        StateError: the state cannot be saved, ranks disagree on it, or `path` is taken. Nothing was written.
        SaveFailed: a rank could not write, or is lost. Nothing is left of it. Where a rank is lost, this is
            `ferro.PeerLost` as well, and the group can shrink.
    """
    check_group(group)
    check_timeout(timeout_s)
    step = checked_step(step)
    storage, name = split_path(path)
    own: ProcessGroup | None = None
    try:
        if group is not None and group.world_size > 1:
            own = group.subgroup(range(group.world_size), timeout_s=timeout_s)
        plan = plan_save(
            state,
            own,
            writes_ranges=storage.writes_ranges,
            check_replicas=check_replicas,
            same={"name": name, "step": step, "overwrite": overwrite},
            timeout_s=timeout_s,
        )
        with byte_progress("saving", plan.written_bytes, plan.rank, progress) as advance:
            write_checkpoint(
                plan, None, storage, name, own, step=step, overwrite=overwrite, timeout_s=timeout_s, progress=advance
            )
    except SaveFailed as error:
        note_loss(group, error, timeout_s)
        raise
    except (PeerLost, CollectiveTimeout, GroupClosed, RendezvousError) as error:
        # A rank was lost before anything was written; `write_checkpoint` tells of it afterwards.
        note_loss(group, error, timeout_s)
        text = f"saving {os.fspath(path)} failed: {error} Nothing was saved; earlier checkpoints are as they were."
        raise save_failed(text, error, path=os.fspath(path), rank=None if group is None else group.rank) from error
    finally:
        if own is not None:
            own.close()
