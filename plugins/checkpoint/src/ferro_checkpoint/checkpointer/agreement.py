"""StepAgreement: what all ranks of a checkpointer know together, one step late.

At the end of a step each rank begins an all_reduce of a few bytes; at the beginning of the next step it reads the
result, which has come meanwhile. So a step waits only for ranks that are more than one step behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ferro.types import ReduceOp

if TYPE_CHECKING:
    from ferro import ProcessGroup

# The bytes, each of which is the greatest of all ranks.
DUE = 0  # rank 0's clock: a save is due
MEMORY_DUE = 1  # rank 0's clock: a save to the ranks' memories is due
PREEMPTED = 2  # a rank has received SIGTERM
BUSY = 3  # a save is under way
FAILED = 4  # a save has failed, and the program has not been told
_COUNT = 8


class StepAgreement:
    """One small all_reduce that is under way between two steps.

    Args:
        group: the checkpointer's own; None for a single rank.
        timeout_s: how long to wait for the others in a step.
    """

    def __init__(self, group: ProcessGroup | None, timeout_s: float) -> None:
        self._own = np.zeros(_COUNT, np.uint8)
        self._agreed = np.zeros(_COUNT, np.uint8)
        self._under_way = False
        self._operation = None
        self.rank = 0 if group is None else group.rank
        if group is not None:
            reduction = ReduceOp.MAX
            self._operation = group.persistent(
                "all_reduce", self._own, op=reduction, out=self._agreed, timeout_s=timeout_s
            )

    def publish(self, due: bool, memory_due: bool, preempted: bool, busy: bool, failed: bool) -> None:
        """Begin to tell the others; every rank calls this in the same steps."""
        own = self._own
        own[DUE], own[MEMORY_DUE], own[PREEMPTED], own[BUSY], own[FAILED] = due, memory_due, preempted, busy, failed
        if self._operation is not None:
            self._operation.start()
        else:
            self._agreed[:] = own
        self._under_way = True

    def read(self) -> bytes | None:
        """Return the result of the agreement that the step before began; None if it began none."""
        if not self._under_way:
            return None
        self._under_way = False
        if self._operation is not None:
            self._operation.wait()
        return self._agreed.tobytes()

    def close(self) -> None:
        """End it, after all ranks have called `publish` equally often."""
        self.read()
        if self._operation is not None:
            self._operation.close()
