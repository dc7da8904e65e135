"""Checkpointer: saves the state of a training while it goes on, and finds it again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ferro import FerroError, UsageError
from ferro_checkpoint.arguments import check_group
from ferro_checkpoint.checkpointer.agreement import BUSY, FAILED, PREEMPTED, StepAgreement
from ferro_checkpoint.checkpointer.arguments import check_seconds, checked_metrics, checked_step
from ferro_checkpoint.checkpointer.every import SavePolicy, SaveSchedules
from ferro_checkpoint.checkpointer.keep import KeepPolicy
from ferro_checkpoint.checkpointer.last_save import save_and_end
from ferro_checkpoint.checkpointer.memory.memory_storage import MemoryStorage
from ferro_checkpoint.checkpointer.own_groups import OwnGroups
from ferro_checkpoint.checkpointer.preemption import Preempted, TerminationSignal
from ferro_checkpoint.checkpointer.resuming import load_newest
from ferro_checkpoint.checkpointer.running_save import RunningSave
from ferro_checkpoint.checkpointer.save_result import SaveResult
from ferro_checkpoint.checkpointer.save_starter import SaveStarter, Target
from ferro_checkpoint.plan.failures import check_same
from ferro_checkpoint.plan.lost_rank import told_to
from ferro_checkpoint.progress import Progress
from ferro_checkpoint.storage.opening import open_storage

if TYPE_CHECKING:
    from ferro import ProcessGroup


class Checkpointer:
    """Saves a state while training goes on.

        with Checkpointer("runs/7", group, every=Every(steps=500), keep=Last(3)) as keeper:
            first = keeper.resume(into=state) or 0
            for step in range(first + 1, 10_001):
                ...
                keeper.step(step, state, loss=loss)

    All ranks of the group make the same calls in the same order: `step`, `save`, `resume`, `wait` and `close`. They
    happen in the program's own thread. What is written is what the state holds when `step` is called: `step` copies it,
    and returns; a thread of low priority writes the copy. The checkpoints are named `step-000000500`.

    The ranks communicate in two groups of their own, never in `group` itself. With policies of steps they do so only
    while a save is under way; otherwise, and with `preemption_s`, each step begins a collective of 8 bytes, of which
    the next step reads the result, so that all ranks act one step later.

    Args:
        directory: where the checkpoints are; None to have them in memory only.
        group: the ranks that train together; None for one process alone.
        every: when to save; None to save only when `save` is called.
        keep: which checkpoints to keep; None for all. A removed one loses its commit record first.
        async_: False to write in `step` itself, without a copy.
        in_memory: keep the ranks' states in their memories, too, each with a copy at another rank: with each save
            (True), or at times of its own (a policy). A rank gives memory for about four times its share of the bytes:
            for the last checkpoint and the one that is written, of each its own part and the copy of another's.
        preemption_s: save and end when SIGTERM comes, within so many seconds; see `Preempted`. Needs the main thread.
            A signal after the last `step` saves nothing: `close` sends it again.
        timeout_s: how long a save may take, and how long to wait for other ranks.
        progress: called with the bytes that this rank has written of a save, and all it writes; a bar on the terminal
            of long saves if None.

    Raises:
        UsageError: the arguments make no sense.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        group: ProcessGroup | None = None,
        *,
        every: SavePolicy | None = None,
        keep: KeepPolicy | None = None,
        async_: bool = True,
        in_memory: bool | SavePolicy = False,
        preemption_s: float | None = None,
        timeout_s: float = 600.0,
        progress: Progress | None = None,
    ) -> None:
        if directory is None and in_memory is False:
            raise UsageError("Checkpointer: without a directory, give in_memory=True or a policy")
        if keep is not None and not isinstance(keep, KeepPolicy):
            raise UsageError(f"Checkpointer: keep is Last(n), Best(metric, n), some with |, or None, not {keep!r}")
        check_group(group)
        check_seconds(preemption_s=preemption_s, timeout_s=timeout_s)
        self._schedules = SaveSchedules(every, None if isinstance(in_memory, bool) else in_memory)
        self._background, self._timeout_s = async_, float(timeout_s)
        self._same = {
            "every": repr(every),
            "in_memory": repr(in_memory),
            "async_": bool(async_),
            "preemption": preemption_s is not None,
            "directory": "None" if directory is None else "given",
        }
        storage = None if directory is None else open_storage(directory)
        self._starter = SaveStarter(storage, MemoryStorage() if in_memory is not False else None, keep, progress)
        self._group = group
        self._opened: tuple[OwnGroups, StepAgreement] | None = None
        self._running = RunningSave()
        self._pid = os.getpid()
        self._closed = False
        self._signal = None if preemption_s is None else TerminationSignal(preemption_s)

    @property
    def staging_bytes(self) -> int:
        """The memory of this rank for the copy that is written; 0 before the first save."""
        return self._starter.staging.nbytes

    @property
    def memory_bytes(self) -> int:
        """The memory that this rank gives to checkpoints in memory."""
        return 0 if self._starter.memory is None else self._starter.memory.nbytes

    def step(self, step: int, state: object, **metrics: float) -> SaveResult | None:
        """Save the state if a policy says so.

        Args:
            step: the number of the step that has just ended.
            state: what to save; it may be changed as soon as the call returns.
            metrics: of this step, for `Best`; those of rank 0 count.

        Returns:
            the save that has begun, or None.

        Raises:
            SaveFailed: an earlier save has failed, or this one, if it was written at once. Where a rank is gone, it is
                `ferro.PeerLost` as well, and `group.shrink()` works, whoever has noticed the loss first.
            StateError: the ranks gave different steps or states; or the directory has later steps of another run, and
                this one has not called `resume`. Nothing was saved.
            UsageError: a metric of rank 0 is no number.
            Preempted: SIGTERM came to a rank, and the state was saved, or could not be in time.
        """
        step = checked_step(step)
        self._check_open()
        with told_to(self._group, self._timeout_s):
            return self._step(step, state, metrics)

    def save(self, step: int, state: object, **metrics: float) -> SaveResult:
        """Save the state now, as `step` does; if this step is saved already or being saved, return that save."""
        step = checked_step(step)
        self._check_open()
        with told_to(self._group, self._timeout_s):
            groups, agreement = self._open()
            checked = checked_metrics(metrics, groups.rank)
            self._read(agreement)
            result = self._save(step, state, checked, disk=True, memory=True)
            self._publish(agreement)
            return result

    def resume(self, into: object, group: ProcessGroup | None = None) -> int | None:
        """Load the newest checkpoint that is whole, the same on all ranks, into a state of the same names and shapes.

        One that turns out to be damaged while it is loaded is left out with a warning, and the next older one is
        loaded. A checkpoint in the ranks' memories is taken if it is at least as new as the newest in the directory.

        Args:
            into: the state; it is changed in place.
            group: the ranks that go on together, if they are others than before: after the loss of a rank, what
                `group.shrink()` returns. Each rank of it calls this, also one that has just joined and has nothing.

        Returns:
            its step; None if there is no checkpoint.

        Raises:
            CheckpointDamaged: there are checkpoints, and all are damaged.
            CheckpointIncomplete: parts of what was in the ranks' memories are lost, and there is no other checkpoint.
        """
        self._check_open()
        check_group(group)
        if group is not None and group is not self._group:
            self._running.drop()
            self._leave(in_good_order=False)
            self._group = group
        with told_to(self._group, self._timeout_s):
            groups, agreement = self._open()
            self._read(agreement)
            self.wait()
            self._running.forget()
            step = load_newest(into, self._starter, groups)
        self._starter.knows_directory = True
        if step is not None:
            self._schedules.resumed(step)
        return step

    def wait(self) -> None:
        """Wait until the save that is under way has ended; raise its error, if it has failed."""
        if os.getpid() != self._pid:
            return  # a forked process: the save is its parent's
        try:
            with told_to(self._group, self._timeout_s):
                self._running.wait()
        except FerroError:
            self._starter.failed()
            raise

    def close(self) -> None:
        """Wait for the save under way, leave the groups, restore the handler of SIGTERM; raise a failed save's error.

        Idempotent.
        """
        self._end(failing=False)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end(failing=error is not None and not isinstance(error, Preempted))

    # -- parts of a step, and the end ----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this Checkpointer was closed: make another one")
        if os.getpid() != self._pid:
            raise UsageError("this Checkpointer belongs to the process from which this one was forked: make another")

    def _step(self, step: int, state: object, metrics: Mapping[str, float]) -> SaveResult | None:
        groups, agreement = self._open()
        metrics = checked_metrics(metrics, groups.rank)
        agreed = self._read(agreement, may_end=True)
        if agreed is not None and agreed[PREEMPTED]:
            assert self._signal is not None, "it is the same on all ranks"
            save_and_end(
                step, state, metrics, self._starter, self._running, self._signal, in_background=self._background
            )
        disk, memory = self._schedules.due(step, agreed)
        result = self._save(step, state, metrics, disk=disk, memory=memory) if disk or memory else None
        if self._running.unsettled or self._signal is not None or self._schedules.needs_agreement:
            self._publish(agreement)
        return result

    def _open(self) -> tuple[OwnGroups, StepAgreement]:
        """Make the groups, when they are used for the first time; all ranks do."""
        if self._opened is None:
            groups = OwnGroups(self._group, self._timeout_s)
            try:
                check_same(groups.gather(self._same))
            except UsageError:
                groups.close(in_good_order=True)
                raise
            self._starter.use(groups)
            self._running.logs = self._running.logs and groups.rank == 0
            self._opened = groups, StepAgreement(groups.steps, self._timeout_s)
        return self._opened

    def _read(self, agreement: StepAgreement, *, may_end: bool = False) -> bytes | None:
        """Read what the ranks agreed on in the step before; raise the error of a save that has failed.

        Where the program `may_end` by SIGTERM, that comes first, and a failure is left to the last save.
        """
        agreed = agreement.read()
        if agreed is not None and may_end and agreed[PREEMPTED]:
            return agreed
        if agreed is not None and agreed[FAILED]:
            self._starter.failed()
            self._running.raise_failure()
        if agreed is not None and not agreed[BUSY]:
            self._running.settle()
        return agreed

    def _publish(self, agreement: StepAgreement) -> None:
        disk, memory = self._schedules.due_by_clock() if agreement.rank == 0 else (False, False)
        preempted = self._signal is not None and self._signal.received_at is not None
        agreement.publish(disk, memory, preempted, self._running.busy, self._running.failed)

    def _save(self, step: int, state: object, metrics: Mapping[str, float], *, disk: bool, memory: bool) -> SaveResult:
        target = self._target(disk=disk, memory=memory, timeout_s=self._timeout_s)
        self._schedules.began(disk=target.disk)
        last = self._running.last_of(step, on_disk=target.disk)
        if last is not None:
            return last
        try:
            waited_s = self._running.wait_for_turn(step)
            result = self._starter.save(step, state, metrics, target, waited_s)
            self._running.begin(result, on_disk=target.disk)
            if not target.background:
                self._running.wait()
        except FerroError:
            self._starter.failed()
            raise
        return result

    def _target(self, *, disk: bool, memory: bool, timeout_s: float) -> Target:
        """Choose where a save goes: one to the directory goes into memory, too, if that is wanted at all."""
        memory = (disk or memory) and self._starter.memory is not None
        disk = disk and self._starter.storage is not None
        return Target(disk=disk, memory=memory, background=self._background, timeout_s=timeout_s)

    def _leave(self, *, in_good_order: bool) -> None:
        """Leave the groups."""
        if self._opened is None:
            return
        (groups, agreement), self._opened = self._opened, None
        if in_good_order:
            with contextlib.suppress(FerroError):  # the program has left the group before
                agreement.close()
        groups.close(in_good_order=in_good_order)

    def _end(self, *, failing: bool) -> None:
        """Close, while an exception is on its way or not."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() != self._pid:
            return  # a forked process has nothing of its own here: the save, the groups and the signal are its parent's
        error = None
        try:
            error = self._running.finish()
            self._leave(in_good_order=not failing and not self._running.given_up)
            self._starter.release()
        finally:
            if self._signal is not None:
                self._signal.close(deliver=not failing)
        if error is not None and not failing:
            with told_to(self._group, self._timeout_s):
                self._running.raise_failure()
