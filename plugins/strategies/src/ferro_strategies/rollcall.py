"""RollCall: who still has batches, asked before each joint step when ranks may run out early.

Before every step in which they communicate, ranks say which step that is; a rank without
batches says that it has joined, and so learns in what to take part. One reduction of
`world_size` bytes:

    rank            0         1         2
    says            BACKWARD  JOINED    BACKWARD      1 shadows the reduction of gradients
    says            JOINED    JOINED    BACKWARD      0 and 1 do
    says            JOINED    JOINED    JOINED        all are done; 2 was last
"""

from __future__ import annotations

import enum

import numpy as np

from ferro import ProcessGroup, UsageError


class Step(enum.IntEnum):
    """What a rank is about to do."""

    JOINED = 0
    BUFFERS = 1
    BACKWARD = 2


class RollCall:
    """Knows which ranks are active.

    Attributes:
        active: ranks that were active when last there were any.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.active = tuple(range(group.world_size))

    def announce(self, step: Step) -> Step:
        """Say what this rank is about to do; return what the active ranks do, or JOINED.

        Raises:
            UsageError: active ranks are about to do different things; raised on every rank.
        """
        said = np.zeros(self._group.world_size, np.uint8)
        said[self._group.rank] = step
        said = self._group.all_reduce(said, "max")
        active = tuple(np.flatnonzero(said).tolist())
        if not active:
            return Step.JOINED
        self.active = active
        steps = {rank: Step(said[rank]) for rank in active}
        if len(set(steps.values())) > 1:
            words = ", ".join(f"rank {rank}: {item.name}" for rank, item in steps.items())
            raise UsageError(
                f"DDP.join: ranks are at different steps ({words}). Between entering and leaving "
                "join(), every rank must make the same passes per batch."
            )
        return steps[active[0]]
