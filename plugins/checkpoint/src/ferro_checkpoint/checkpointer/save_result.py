"""SaveResult: one save, under way or ended."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True, kw_only=True)
class SaveResult:
    """One save of a `Checkpointer`.

    Attributes:
        step: the training's step.
        path: where it is; "memory/…" where it is in the ranks' memories alone.
        bytes: how many bytes of the state this rank supplies.
        waited_s: how long `step()` waited for the save before.
        copied_s: how long `step()` was busy with the plan and the copy.
        written_s: how long the writing took, in the background or in `step()`; 0.0 until it has ended.
        error: what went wrong, or None.
        deadline: the `time.monotonic()` second at which it has ended, one way or the other.
        told: whether the program has been told of its failure, or needs not be told of one.
    """

    step: int
    path: str
    bytes: int = 0
    waited_s: float = 0.0
    copied_s: float = 0.0
    written_s: float = 0.0
    error: Exception | None = None
    deadline: float = field(default=math.inf, repr=False)
    told: bool = field(default=False, repr=False)
    _ended: threading.Event = field(default_factory=threading.Event, repr=False)

    def done(self) -> bool:
        """Say whether it has ended on this rank, well or not. Never blocks."""
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it has ended on this rank, at its own deadline at the latest; raise its error, if it has failed.

        The next `step()`, `wait()` or `close()` of the checkpointer raises that error as well.

        Args:
            timeout_s: how long to wait in seconds, or None.

        Returns:
            False if it has not ended by then.
        """
        left_s = max(0.0, self.deadline - time.monotonic())
        ended = self.wait_ended(left_s if timeout_s is None else min(left_s, timeout_s))
        if self.error is not None:
            raise self.error
        return ended

    def wait_ended(self, timeout_s: float | None) -> bool:
        """Wait until it has ended; say whether it has. Raises no error."""
        most = threading.TIMEOUT_MAX
        return self._ended.wait(most if timeout_s is None else min(timeout_s, most))

    def end(self, error: Exception | None, written_s: float) -> None:
        """Note the end; the thread that writes calls this, once."""
        self.error, self.written_s = error, written_s
        self._ended.set()
