"""SaveStarter: starts one save after another: the plan, the copy, and the writing in a background thread or at once."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ferro import FerroError
from ferro.errors import PeerLost
from ferro_checkpoint.checkpointer import background
from ferro_checkpoint.checkpointer.catalog import Catalog, name_of
from ferro_checkpoint.checkpointer.keep import KeepPolicy
from ferro_checkpoint.checkpointer.memory.memory_storage import MemoryStorage
from ferro_checkpoint.checkpointer.memory.neighbour import replicate, ring
from ferro_checkpoint.checkpointer.memory.tee import TeeStorage
from ferro_checkpoint.checkpointer.own_groups import OwnGroups
from ferro_checkpoint.checkpointer.save_result import SaveResult
from ferro_checkpoint.checkpointer.staging import StagingBuffer
from ferro_checkpoint.errors import StateError, save_failed
from ferro_checkpoint.plan.lost_rank import told_to
from ferro_checkpoint.progress import Progress, byte_progress
from ferro_checkpoint.saving.save_plan import SavePlan, plan_save
from ferro_checkpoint.saving.snapshot import Snapshot, place_parts
from ferro_checkpoint.saving.write import write_checkpoint
from ferro_checkpoint.storage.storage import Storage

_LOG = logging.getLogger("ferro.checkpoint")
_GRACE_S = 10.0  # what a save may take beyond its timeout until it reports that


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a save goes.

    Attributes:
        disk: whether it goes into the directory.
        memory: whether it goes into the ranks' memories.
        background: whether a thread writes it while training goes on.
        timeout_s: how long it may take.
    """

    disk: bool
    memory: bool
    background: bool
    timeout_s: float


class SaveStarter:
    """Makes the saves of one checkpointer on one rank.

    Attributes:
        replaceable: the names of damaged checkpoints, which a save of the same step replaces.
        staging: the memory for the copy.
        memory: the checkpoints in memory, or None.
        catalog: those in the directory, or None.
        storage: the directory, or None.
        groups: the groups, once there are some.
        knows_directory: whether the program has resumed, or saved, so that it goes on from what is in the directory.
    """

    def __init__(
        self, storage: Storage | None, memory: MemoryStorage | None, keep: KeepPolicy | None, progress: Progress | None
    ) -> None:
        self.replaceable: set[str] = set()
        self.staging = StagingBuffer()
        self.storage = storage
        self.memory = memory
        self.catalog = None if storage is None else Catalog(storage)
        self._keep = keep
        self._progress = progress
        self._plans: dict[bool, SavePlan] = {}  # by whether ranks write ranges of one file
        self._ring: list[int] = []
        self.groups: OwnGroups | None = None
        self._failed = False
        self.knows_directory = False

    def use(self, groups: OwnGroups) -> None:
        """Save with these groups from now on; all ranks call it."""
        self.groups = groups
        self._plans = {}
        if self.memory is not None:
            self._ring = ring([str(host) for host in groups.gather(socket.gethostname())])

    def save(
        self, step: int, state: object, metrics: Mapping[str, float], target: Target, waited_s: float
    ) -> SaveResult:
        """Begin a save; the one before has ended. All ranks call it together."""
        began = time.monotonic()
        groups = self.groups
        assert groups is not None
        if self._failed or target.memory:  # the copies of the save before may have failed, on some ranks or all
            groups.renew_saves()
            self._failed = False
        storage = self._storage(target)
        name = name_of(step)
        path = f"{storage.path}/{name}"
        try:
            plan = self._plan(step, state, target, storage, groups)
        except PeerLost as error:
            text = f"saving {path} failed: {error} Nothing was saved; earlier checkpoints are as they were."
            raise save_failed(text, error, path=path, rank=groups.rank) from error
        self._plans[storage.writes_ranges] = plan
        self.knows_directory = self.knows_directory or target.disk
        if not plan.staged:
            place_parts(plan)
        snapshot = Snapshot(plan, self.staging.room(plan.staged_bytes)) if target.background else None
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}  # others are no JSON
        result = SaveResult(step=step, path=path, bytes=plan.staged_bytes, waited_s=waited_s)
        write = partial(self._write_and_tell, plan, snapshot, storage, name, step, finite, target, groups)
        result.copied_s = time.monotonic() - began
        if target.background:
            whose = f"rank {groups.rank}: " if groups.world_size > 1 else ""
            result.deadline = time.monotonic() + target.timeout_s + _GRACE_S
            background.start(result, write, whose)
        else:
            background.run(result, write)
        return result

    def failed(self) -> None:
        """Note that a save has failed, on all ranks: its thread may still use the copy, and its group may be dead."""
        self._failed = True
        self.staging.release()

    def release(self) -> None:
        """Let go of the memory."""
        self._plans = {}
        self.staging.release()
        if self.memory is not None:
            self.memory.release()

    def _plan(self, step: int, state: object, target: Target, storage: Storage, groups: OwnGroups) -> SavePlan:
        return plan_save(
            state,
            groups.steps,
            writes_ranges=storage.writes_ranges,
            previous=self._plans.get(storage.writes_ranges),
            same={"step": step, "goes to the directory": target.disk},
            refused=self._refusal(step) if target.disk else None,
            timeout_s=target.timeout_s,
        )

    def _refusal(self, step: int) -> StateError | None:
        """Refuse, on rank 0, to mix a new run with the later steps of another one, which a resume would then take."""
        if self.knows_directory or self.catalog is None or self.groups is None or self.groups.rank != 0:
            return None
        try:
            newest = self.catalog.steps()[:1]
        except (OSError, FerroError):
            return None  # the save tells of it
        if not newest or newest[0][0] < step:
            return None
        directory = self.catalog.path
        return StateError(
            f"{directory} has checkpoints up to step {newest[0][0]} already, and this run would save step {step}: call "
            f"resume(into=state) first to go on from them, or give another directory. Nothing was saved"
        )

    def _storage(self, target: Target) -> Storage:
        if self.storage is None or not target.disk:
            assert self.memory is not None
            return self.memory
        return TeeStorage(self.storage, self.memory) if target.memory and self.memory is not None else self.storage

    def _write_and_tell(self, plan: SavePlan, *arguments: Any) -> None:
        """Write as `_write`; if that notices the loss of a rank, the training's group learns of it."""
        assert self.groups is not None
        with told_to(self.groups.training, self.groups.timeout_s):
            self._write(plan, *arguments)

    def _write(
        self,
        plan: SavePlan,
        snapshot: Snapshot | None,
        storage: Storage,
        name: str,
        step: int,
        metrics: dict[str, float],
        target: Target,
        groups: OwnGroups,
    ) -> None:
        """Write a checkpoint, copy it to the neighbour, and remove those that are not kept."""
        overwrite = name in self.replaceable
        if overwrite and target.disk and self.catalog is not None:
            self.catalog.forget(name)
        deadline = time.monotonic() + target.timeout_s
        with byte_progress(f"saving step {step}", plan.written_bytes, plan.rank, self._progress) as advance:
            write_checkpoint(
                plan,
                snapshot,
                storage,
                name,
                groups.saves,
                step=step,
                overwrite=overwrite,
                timeout_s=target.timeout_s,
                progress=advance,
                metrics=metrics,
                if_taken="this step was saved before: go on with a later one, or give another directory",
            )
        if target.memory and self.memory is not None:
            held = self.memory.other
            try:
                replicate(held, plan, groups.saves, self._ring, max(1.0, deadline - time.monotonic()))
            except FerroError as error:
                text = f"the copies in the ranks' memories were not made: {error}"
                if not target.disk:
                    raise save_failed(f"step {step}: {text}", error, path=f"memory/{name}", rank=groups.rank) from error
                _LOG.warning("rank %d: step %d was saved as %s/%s, but %s", groups.rank, step, storage.path, name, text)
                with contextlib.suppress(FerroError), told_to(groups.training, groups.timeout_s):
                    raise
            else:
                self.memory.agree_on(held)
        if target.disk and self.catalog is not None:
            self.replaceable.discard(name)
            if groups.rank == 0 and self._keep is not None:
                self.catalog.remove_others(self._keep, name, self.replaceable)
