"""Uneven inputs: the ranks agree before each step on which of them still have batches (`join`).

Before every step in which ranks communicate, each rank announces the number of that step. A rank without batches
announces JOINED, and learns from the others in which step it has to take part. An announcement is one reduction of a
few bytes per rank. With the steps of DDP:

    rank            0         1         2
    announces       BACKWARD  JOINED    BACKWARD      1 shadows the reduction of gradients
    announces       JOINED    JOINED    BACKWARD      0 and 1 shadow it
    announces       JOINED    JOINED    JOINED        all are done; 2 was last
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ferro import ProcessGroup, UsageError

from .nn.arrays import Array

# A rank without batches announces this; steps have numbers from 1 to 2**32 - 1.
JOINED = 0
_STEP_BYTES = 4


class UnevenInputs:
    """The agreement of all ranks on their next step, and on which of them have batches left.

    Args:
        strategy: name for messages.
        groups: groups that together connect all ranks: one group, or the row and the column of a mesh. Ranks are
            numbered row by row. Announcements are ordered with the other calls on each group.
        describe: names a step, for messages.
        note_bytes: length of the note that goes with a step.

    Attributes:
        active: the ranks that had a batch at the last announcement; once no rank has one, those of the announcement
            before.
    """

    def __init__(
        self, strategy: str, groups: Sequence[ProcessGroup], describe: Callable[[int], str], note_bytes: int = 0
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
        """Tell all ranks this rank's next step, and return the next step of the active ranks.

        Args:
            step: the number of the step, or JOINED.
            note: (note_bytes,) of uint8, the same on all active ranks; None for zeros.

        Returns:
            The step of the active ranks and its note; JOINED when no rank is active.

        Raises:
            UsageError: active ranks announced different steps; raised on every rank.
        """
        heads = self.world_size * _STEP_BYTES
        message = np.zeros(heads + self._note_bytes, np.uint8)
        message[:heads].view(np.uint32)[self._rank] = step
        if note is not None:
            message[heads:] = note
        for group in self._groups:
            group.all_reduce(message, "max", out=message)  # other ranks have zeros in this place
        steps = message[:heads].view(np.uint32)
        active = tuple(np.flatnonzero(steps).tolist())
        if not active:
            return JOINED, message[heads:]
        self.active = active
        if len(set(steps[list(active)].tolist())) > 1:
            words = ", ".join(f"rank {rank}: {self._describe(int(steps[rank]))}" for rank in active)
            raise UsageError(
                f"{self._strategy}.join: ranks are at different steps ({words}). Between entering "
                "and leaving join(), every rank must make the same passes per batch."
            )
        return int(steps[active[0]]), message[heads:]

    def roots(self) -> list[int]:
        """Return the first active rank's rank in each of the groups."""
        return [self.active[0] // stride % size for stride, size in self._axes]
