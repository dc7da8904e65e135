"""UnevenInputs: who still has batches, asked before each joint step when ranks may run out early.

Before every step in which they communicate, ranks say which step that is; a rank without
batches says that it has joined, and so learns in what to take part. One reduction of a few
bytes per rank, here of DDP's:

    rank            0         1         2
    says            BACKWARD  JOINED    BACKWARD      1 shadows the reduction of gradients
    says            JOINED    JOINED    BACKWARD      0 and 1 do
    says            JOINED    JOINED    JOINED        all are done; 2 was last
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ferro import ProcessGroup, UsageError

from .nn.arrays import Array

# What a rank without batches says; steps are numbers from 1 to 2**32 - 1.
JOINED = 0
_STEP_BYTES = 4


class UnevenInputs:
    """Knows which ranks are active.

    Args:
        strategy: whose steps they are, for messages.
        groups: whose product is all ranks: those of the first are numbered 0, 1, …, then those
            of its copies. On each, calls are made in one order with whatever else is on it.
        describe: a step's name, for messages.
        note_bytes: length of the notes that go with steps.

    Attributes:
        active: ranks that were active when last there were any.
    """

    def __init__(
        self,
        strategy: str,
        groups: Sequence[ProcessGroup],
        describe: Callable[[int], str],
        note_bytes: int = 0,
    ) -> None:
        self._strategy = strategy
        self._groups = groups
        self._describe = describe
        self._note_bytes = note_bytes
        sizes = [group.world_size for group in groups]
        strides = [math.prod(sizes[:axis]) for axis in range(len(sizes))]
        self._rank = sum(g.rank * stride for g, stride in zip(groups, strides, strict=True))
        self._axes = list(zip(strides, sizes, strict=True))
        self.world_size = math.prod(sizes)
        self.active = tuple(range(self.world_size))

    def announce(self, step: int, note: Array | None = None) -> tuple[int, Array]:
        """Say what this rank is about to do; return what the active ranks do, or JOINED.

        Args:
            step: the step.
            note: (note_bytes,) of uint8, the same on all active ranks; None for zeros.

        Returns:
            The step and its note.

        Raises:
            UsageError: active ranks are about to do different things; raised on every rank.
        """
        heads = self.world_size * _STEP_BYTES
        said = np.zeros(heads + self._note_bytes, np.uint8)
        said[:heads].view(np.uint32)[self._rank] = step
        if note is not None:
            said[heads:] = note
        for group in self._groups:
            group.all_reduce(said, "max", out=said)  # a rank's bytes are zeros elsewhere
        steps = said[:heads].view(np.uint32)
        active = tuple(np.flatnonzero(steps).tolist())
        if not active:
            return JOINED, said[heads:]
        self.active = active
        if len(set(steps[list(active)].tolist())) > 1:
            words = ", ".join(f"rank {rank}: {self._describe(int(steps[rank]))}" for rank in active)
            raise UsageError(
                f"{self._strategy}.join: ranks are at different steps ({words}). Between entering "
                "and leaving join(), every rank must make the same passes per batch."
            )
        return int(steps[active[0]]), said[heads:]

    def roots(self) -> list[int]:
        """Return the rank, in each of the groups, of the first rank that was last active."""
        return [self.active[0] // stride % size for stride, size in self._axes]
