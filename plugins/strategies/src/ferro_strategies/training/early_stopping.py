"""Stop a training on all ranks in the same step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any, Literal

import numpy as np

from ferro import ProcessGroup, UsageError

from ..nn.checks import check_group


def agree_stop(group: ProcessGroup, *reasons: object) -> bool:
    """Return True on every rank if any of the reasons is true on any rank.

    A rank that left the loop alone would make the others wait in their next collective. All ranks call it, after equal
    numbers of steps; it reduces one byte.

        with StopSignals() as stop_signals:
            for epoch in range(epochs):
                …
                if agree_stop(group, stop_signals, early_stopping.update(validation_loss)):
                    break

    Raises:
        UsageError: a reason is an object that is always true, such as a function that was not called.
    """
    check_group("agree_stop", group)
    for reason in reasons:
        if not any(hasattr(type(reason), method) for method in ("__bool__", "__len__")):
            raise UsageError(
                f"agree_stop: {reason!r} is true whatever happens, so that the training would stop at once. Give the "
                "result of a call, such as early_stopping.update(loss), or a StopSignals."
            )
    return bool(group.all_reduce(np.array(any(bool(reason) for reason in reasons)), "max"))


class StopSignals:
    """Note SIGTERM and SIGINT (ctrl-c) while a `with` block runs, in place of ending the program.

    It is true once a signal has come; give it to `agree_stop`, and save the model behind the loop. A second signal does
    what it would have done without this. `ferro run` and schedulers send SIGTERM some seconds before SIGKILL.

    Raises:
        UsageError: it is entered in another thread than the main one, where Python handles no signals.
    """

    def __init__(self, *signals: int) -> None:
        self.received: signal.Signals | None = None
        self._signals = signals or (signal.SIGTERM, signal.SIGINT)
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("StopSignals: only the main thread can handle signals; enter it there.")
        self._before = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: it was not installed by Python, and cannot be
                signal.signal(number, handler)
        self._before = {}


class EarlyStopping:
    """Tell when a metric has not improved for `patience` updates.

    Give it a metric that is the same on every rank, such as that of `AveragedMetrics`.

    Args:
        patience: how many updates in a row may bring no improvement.
        min_delta: by how much a value must be better than the best one to count as an improvement.
        mode: "min" if less is better, "max" if more is.

    Attributes:
        best: the best value, None before the first.
        waited: updates since then.
    """

    def __init__(self, patience: int, *, min_delta: float = 0.0, mode: Literal["min", "max"] = "min") -> None:
        if patience < 1 or min_delta < 0 or mode not in ("min", "max"):
            raise UsageError(
                "EarlyStopping: patience must be at least 1, min_delta at least 0, mode 'min' or 'max'; "
                f"got {patience}, {min_delta}, {mode!r}."
            )
        self.patience, self.min_delta, self.mode = patience, min_delta, mode
        self.best: float | None = None
        self.waited = 0

    def update(self, value: float) -> bool:
        """Take in the next value; return True if the patience is over. NaN is never an improvement."""
        value = float(value)
        gain = 0.0 if self.best is None else (self.best - value) * (1 if self.mode == "min" else -1)
        if value == value and (self.best is None or gain > self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, float | int | None]:
        """Return the best value, and the updates since then."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.best, self.waited = state["best"], int(state["waited"])
