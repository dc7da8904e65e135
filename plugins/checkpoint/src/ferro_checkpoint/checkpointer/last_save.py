"""The last save of a job that was told to end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NoReturn

from ferro_checkpoint.checkpointer import background
from ferro_checkpoint.checkpointer.preemption import Preempted, TerminationSignal
from ferro_checkpoint.checkpointer.running_save import RunningSave
from ferro_checkpoint.checkpointer.save_starter import SaveStarter, Target
from ferro_checkpoint.errors import SaveFailed


def save_and_end(
    step: int,
    state: object,
    metrics: Mapping[str, float],
    starter: SaveStarter,
    running: RunningSave,
    signal: TerminationSignal,
    *,
    in_background: bool,
) -> NoReturn:
    """Save within the time that is left since SIGTERM came, and raise Preempted; all ranks come here together.

    Args:
        step, state, metrics: as for `Checkpointer.step`.
        starter: makes the save.
        running: the save that is under way.
        signal: the signal that came to this rank, if it did.
        in_background: whether a thread writes; a call of the system that hangs keeps only the thread then.
    """
    groups = starter.groups
    assert groups is not None
    passed_s = 0.0 if signal.received_at is None else time.monotonic() - signal.received_at
    signal.acted = True
    path, fault = None, "there is no directory"
    try:
        passed_s = max(groups.gather(passed_s, timeout_s=signal.allowed_s))
        if starter.storage is not None:
            deadline = time.monotonic() + max(0.0, signal.allowed_s - passed_s)
            path = _save(step, state, metrics, starter, running, deadline, in_background=in_background)
    except Exception as error:  # noqa: BLE001 - the program ends as it was told, whatever became of the save
        fault = str(error) or type(error).__name__
        running.give_up()
    told = f"was saved as {path}" if path else f"could not be saved within {signal.allowed_s:g} s: {fault}"
    ended = Preempted(f"SIGTERM: step {step} {told}; the program ends", step=step, path=path)
    if groups.rank == 0:
        background.tell(str(ended))
    raise ended


def _save(
    step: int,
    state: object,
    metrics: Mapping[str, float],
    starter: SaveStarter,
    running: RunningSave,
    deadline: float,
    *,
    in_background: bool,
) -> str:
    """Save until the deadline, after the save that is under way; return the path."""
    groups = starter.groups
    assert groups is not None
    running.hurry(deadline)
    error = running.finish()
    left_s = max(1.0, deadline - time.monotonic())
    before = groups.gather([running.busy, error is not None], timeout_s=left_s)  # it may have failed on some ranks only
    if any(busy for busy, _ in before):
        raise error or SaveFailed("the save before was not finished by then on another rank", path="", rank=groups.rank)
    failed = any(failed for _, failed in before)
    if failed:
        starter.failed()  # the save before; this one may go well
    last = running.last_of(step, on_disk=True)
    if last is None or failed:
        left_s = max(0.1, deadline - time.monotonic())
        target = Target(disk=True, memory=False, background=in_background, timeout_s=left_s)
        last = starter.save(step, state, metrics, target, 0.0)
        running.begin(last, on_disk=True)
        running.hurry(deadline)
    running.wait()
    return last.path
