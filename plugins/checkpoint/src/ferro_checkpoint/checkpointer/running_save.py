"""RunningSave: the save that is under way, of which the ranks learn together whether it went well."""

from __future__ import annotations

import logging
import time

from ferro_checkpoint.checkpointer import background
from ferro_checkpoint.checkpointer.save_result import SaveResult
from ferro_checkpoint.errors import SaveFailed

_WORTH_TELLING_S = 0.1
_LOG = logging.getLogger("ferro.checkpoint")


class RunningSave:
    """The last save of one rank.

    Attributes:
        unsettled: whether the ranks do not know yet, together, that the last save has ended.
        logs: whether this rank logs that a save had to wait.
        given_up: whether a save was left behind that may still be under way; its group is of no more use.
    """

    def __init__(self) -> None:
        self.unsettled = False
        self.logs = True
        self.given_up = False
        self._hurried = False
        self._last: SaveResult | None = None  # the last save of which no failure was raised
        self._last_on_disk = False
        self._current: SaveResult | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._current is not None and not self._current.done()

    @property
    def failed(self) -> bool:
        """Whether the last save has failed on this rank, and the program has not been told."""
        return self._current is not None and self._current.done() and self._current.error is not None

    def begin(self, result: SaveResult, *, on_disk: bool) -> None:
        """Note a save that has begun on all ranks."""
        self._current = self._last = result
        self._last_on_disk = on_disk
        self.unsettled = True

    def last_of(self, step: int, *, on_disk: bool) -> SaveResult | None:
        """Return the last save if it is one of this step, and on disk if it is to be."""
        last = self._last
        return last if last is not None and last.step == step and self._last_on_disk >= on_disk else None

    def forget(self) -> None:
        """Forget the last save: training goes on from another step."""
        self._last = None

    def hurry(self, deadline: float) -> None:
        """Let nobody wait for the save after this `time.monotonic()` second."""
        self._hurried = True
        if self._current is not None:
            self._current.deadline = min(self._current.deadline, deadline)

    def give_up(self) -> None:
        """Leave the save to itself; the program has been told that it did not go well."""
        self.given_up = True
        if self._current is not None:
            background.told(self._current)
        self.forget()
        self.settle()

    def drop(self) -> None:
        """Wait until the save has ended; its group has lost a rank, so that a failure is logged only."""
        error = self.finish()
        if error is not None and self._current is not None:
            background.told(self._current)
            _LOG.warning("step %d was not saved as %s: %s", self._current.step, self._current.path, error)
        self.settle()

    def settle(self) -> None:
        """Note that the save has ended well on all ranks."""
        self._current = None
        self.unsettled = False

    def finish(self) -> Exception | None:
        """Wait until the save has ended, at its deadline at the latest; return its error, if any."""
        current = self._current
        if current is None:
            return None
        if not current.wait_ended(max(0.0, current.deadline - time.monotonic())):
            text = "the save did not end in time, and may hang in a call of the system; look after the file system"
            if self._hurried:
                text = "its save was not finished by then"
            return SaveFailed(f"step {current.step} was not saved as {current.path}: {text}", path=current.path)
        return current.error

    def wait(self) -> None:
        """Wait until the save has ended; raise its error, if it has failed."""
        if self.finish() is not None:
            self.raise_failure()
        self.settle()

    def raise_failure(self) -> None:
        """Raise the error of the save, once; all ranks come here for the same save."""
        current, error = self._current, self.finish()
        self._last = None
        self.settle()
        if current is not None:
            background.told(current)
            text = f"step {current.step} was not saved as {current.path}: it failed on another rank, whose log says why"
            raise error or SaveFailed(text, path=current.path)

    def wait_for_turn(self, step: int) -> float:
        """Wait for the save before, as another is due; return how long that took, and log it the first time."""
        current = self._current
        if current is None or current.done():
            self.wait()
            return 0.0
        began = time.monotonic()
        self.wait()
        waited_s = time.monotonic() - began
        if waited_s > _WORTH_TELLING_S and self.logs:
            self.logs = False
            text = "step %d waited %.3g s until step %d was saved: saves are due more often than they can be written"
            _LOG.warning(f"{text} (this is logged once; see SaveResult.waited_s)", step, waited_s, current.step)
        return waited_s
