"""The native steps of an exchange: `NATIVE_STEPS` is the compiled type, or None where it was not built.

`read_memory` is its function to try whether another process's memory can be read; without it nothing can.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, TypeAlias

from ferro.types import Array

Source: TypeAlias = "Array | tuple[int, int]"
"""A message as its receiver reads it: in memory that both map, or in a process at an address."""
Channel: TypeAlias = "tuple[Array, Array, Array, int, int, Source | None]"
"""The message, its channel's memory, the bell of the other rank, bytes of a block, slots, and the source where the
receiver reads the message in place (the sender gives the message itself). Arrays are uint8."""


class Steps(Protocol):
    """The steps of one rank's exchange, of which one at a time is under way.

    It holds all arrays until it is closed. Any thread may call any method at any time.
    """

    def __call__(self) -> bool:
        """Begin a step and wait for a short time; say whether it has ended."""

    def begin(self) -> bool:
        """Begin a step: move what can be moved without waiting. Say whether it has ended.

        Raises:
            ValueError: a step is under way, or the exchange is closed.
        """

    def progress(self) -> bool:
        """Move what can be moved without waiting; say whether the step has ended."""

    def wait(self, spins: int, yields: int, seconds: float, /) -> bool:
        """Wait until the step has ended; return False after `seconds` at the latest, or after a signal.

        Args:
            spins: how often to look after a pause of tens of nanoseconds.
            yields: how often, after that, to look after a `sched_yield`; then it sleeps.
            seconds: the longest sleep.
        """

    def awaited(self) -> list[int]:
        """List the messages of this step that have not ended: indices of the sends, and of the receives after them."""

    def close(self, tell: bool, /) -> None:
        """Release all arrays, and `tell` the senders that this rank uses their channels no more.

        A forked child tells nobody, and takes no lock, which a thread of its parent may have held.
        """


class StepsType(Protocol):
    """Makes `Steps`, as `ferro_gloo.shm.exchange.plain_steps.PlainSteps` does.

    The arguments are positional: the bell of this process, its sends, its receives, and how often to spin and to
    yield in a call.
    """

    def __call__(
        self, bell: Array, sends: Sequence[Channel], recvs: Sequence[Channel], spins: int, yields: int, /
    ) -> Steps:
        """Hold the memory of all messages.

        Raises:
            ValueError: a channel does not fit its message.
        """


class ReadMemory(Protocol):
    """Reads memory of a process of this host."""

    def __call__(self, process: int, address: int, nbytes: int, /) -> bytes | None:
        """Read at most 64 bytes; return None where the system refuses."""


def _load() -> tuple[StepsType | None, ReadMemory]:
    try:
        module = import_module("ferro_gloo.shm.exchange._steps")
    except ImportError:
        return None, lambda process, address, nbytes, /: None
    return module.Steps, module.read_memory


NATIVE_STEPS, read_memory = _load()
