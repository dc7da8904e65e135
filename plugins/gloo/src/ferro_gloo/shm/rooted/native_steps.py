"""The native steps of a rooted collective: `RootedSteps` describes the type of this name in the compiled module.

There are none in pure Python: groups without the native helper repeat the ordinary call.
"""

from __future__ import annotations

from typing import Protocol

from ferro.types import Array


class RootedSteps(Protocol):
    """The steps of one rank, of which one at a time is under way; `native/rooted.h` says how they move data.

    Its `late` is called with this object. It waits until the step has ended, or raises an error.

    It holds all memory until it is closed. Any thread may call any method at any time.
    """

    def area_bytes(self, depth: int, /) -> int:
        """Compute the size of an area with so many slots for each writer."""

    def open(self, area: Array, depth: int, /) -> None:
        """Use this area, which all ranks map, and which was zero before the first rank opened it."""

    def step(self) -> bool:
        """Run a step: wait for a short time, and call `late` then.

        Return False, having done nothing, where `Turn.state[BUSY]` is not 0.

        Raises:
            ValueError: a step is under way, or there is no area.
        """

    def begin(self) -> bool:
        """Begin a step, without waiting; say whether it has ended. Raises what `step` raises."""

    def progress(self) -> bool:
        """Do what can be done without waiting; say whether the step has ended."""

    def wait(self, spins: int, yields: int, seconds: float, /) -> bool:
        """Wait until the step has ended; return False after `seconds`, a signal, or where it never will end.

        Args: as those of `ferro_gloo.shm.exchange.native_steps.Steps.wait`.
        """

    def awaited(self) -> list[int]:
        """List the ranks without whose data, or room, the step cannot end."""

    def passed(self, rank: int, /) -> int | None:
        """Count the collectives that a writer has issued; None if that is not beyond this rank's step."""

    def tell_late(self) -> None:
        """Tell the other ranks in which step this one waits."""

    def late_elsewhere(self, rank: int, /) -> int | None:
        """Return the number of another persistent operation, if a rank waits in that as its call of this order."""

    def is_deferred(self, rank: int, /) -> bool:
        """Say whether a rank has started a step that it could not write yet."""

    def other(self) -> tuple[int, int, int] | None:
        """Return the rank that has written another step than this one, and the orders of that step and of this one."""

    def order(self) -> int:
        """Return the number of collectives that this rank had issued on the group before its latest step."""

    def left_out(self) -> tuple[int, int] | None:
        """Return a writer of a step that this rank has not begun to read, and the order of that step."""

    def is_closed(self) -> bool:
        """Say whether `close` was called."""

    def close(self, tell: bool, /) -> None:
        """Release all memory, and `tell` the root that this rank uses it no more; a forked child tells nobody."""
