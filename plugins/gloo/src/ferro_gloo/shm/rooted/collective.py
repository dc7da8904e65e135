"""ShmRootedCollective: a persistent rooted collective through shared memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from ferro.types import Array
from ferro_gloo.shm.exchange.memory import ExchangeMemory
from ferro_gloo.shm.rooted.area import CLOSABLE_AT, COUNTER_BYTES
from ferro_gloo.shm.rooted.native_steps import RootedSteps
from ferro_gloo.shm.rooted.waiting import LateSteps


class ShmRootedCollective:
    """One rank's part in a collective; see `ferro.collectives.fast_path.BoundFastPath`.

    Args:
        steps: moves the data.
        late: waits for the others, or raises an error.
        writes: True if the others wait for this rank's data, and not this rank for theirs.
        memory: of this process.
        area: the memory of the collective, at its root.
        others: all ranks but the root.

    Attributes:
        test: see `BoundFastPath`.
    """

    def __init__(
        self,
        steps: RootedSteps,
        late: LateSteps,
        *,
        writes: bool,
        memory: ExchangeMemory,
        area: Array | None,
        others: list[int],
    ) -> None:
        self._steps = steps
        self._late = late
        self._writes = writes
        self._memory = memory
        self._area = area
        self._others = others
        self._closed = False
        self.test = steps.progress
        memory.add(self)

    @property
    def __call__(self) -> Callable[[], bool]:
        """The native method that runs a step, without a call of Python in between; see `BoundFastPath`."""
        return self._steps.step

    def start(self) -> bool:
        """Begin a step, and return True. One without room for its data goes on beside the program."""
        if not self._steps.begin() and self._writes:
            self._memory.progress_thread.add(self._steps)
        return True

    def finish(self) -> None:
        """Wait until the started step has ended."""
        if not self._steps.progress():
            self._late(self._steps)

    def close(self) -> None:
        """Let go of the arrays, and tell the root; a forked child tells nobody. Idempotent.

        Raises:
            CollectiveMismatch: this rank has left out a step.
        """
        left_out = None if self._closed or self._memory.is_in_child() else self._steps.left_out()
        self.release()
        if left_out is not None:
            self._late.refuse_close(*left_out)

    def release(self) -> None:
        """See `Releasable.release`."""
        if self._closed:
            return
        self._closed = True
        area, self._area = self._area, None
        if self._memory.is_in_child():
            self._steps.close(False)
            return
        self._memory.progress_thread.discard(self._steps)
        self._steps.close(True)
        if area is not None:
            keep_area(self._memory, area, self._others)

    def __del__(self) -> None:
        with suppress(AttributeError):  # __init__ did not end
            self.release()


def keep_area(memory: ExchangeMemory, area: Array, others: list[int]) -> None:
    """Keep the area of a closed collective until the other ranks have closed theirs."""
    memory.keep(area, [rank * COUNTER_BYTES + CLOSABLE_AT for rank in others])
