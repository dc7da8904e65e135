"""OwnGroups: the groups of a checkpointer, so that it never meets the training's collectives.

There are two, since two threads use them at the same time, and the collectives of one group have one order: `steps` is
for what the ranks agree on in `step()` and `resume()`, `saves` for the thread that writes.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

from ferro import FerroError

if TYPE_CHECKING:
    from ferro import ProcessGroup

Value = TypeVar("Value")


class OwnGroups:
    """Two groups of the ranks of the training's group; none where there is one rank.

    All ranks make it together.

    Attributes:
        rank, world_size: as in the training's group.
        steps: the group for the program's own thread, or None.
        saves: the group for the thread that writes, or None.
        timeout_s: how long to wait for other ranks.
        training: the training's group, or None.
    """

    def __init__(self, group: ProcessGroup | None, timeout_s: float) -> None:
        self.rank = 0 if group is None else group.rank
        self.world_size = 1 if group is None else group.world_size
        self.steps: ProcessGroup | None = None
        self.saves: ProcessGroup | None = None
        self.timeout_s = timeout_s
        self.training = group
        if group is not None and group.world_size > 1:
            self._ranks = range(group.world_size)
            self.steps = group.subgroup(self._ranks, name=f"{group.name}-checkpoint", timeout_s=timeout_s)
            self.saves = group.subgroup(self._ranks, name=f"{group.name}-checkpoint-saves", timeout_s=timeout_s)

    def renew_saves(self) -> None:
        """Make another group for saves if that of an earlier save is dead, on some ranks or all; all ranks call it."""
        if self.steps is None or self.saves is None or all(self.gather(self.saves.state == "open")):
            return
        name = self.saves.name
        self.saves.abandon()
        self.saves = self.steps.subgroup(self._ranks, name=name, timeout_s=self.timeout_s)

    def gather(self, value: Value, *, timeout_s: float | None = None) -> list[Value]:
        """Return every rank's value, in the program's own thread; another time to wait may be given."""
        if self.steps is None:
            return [value]
        values: list[Value] = self.steps.all_gather_object(value, timeout_s=timeout_s or self.timeout_s)
        return values

    def from_rank_0(self, value: Value | None) -> Value:
        """Return rank 0's value, in the program's own thread."""
        if self.steps is None:
            assert value is not None
            return value
        found: Value = self.steps.broadcast_object(value, timeout_s=self.timeout_s)
        return found

    def close(self, *, in_good_order: bool) -> None:
        """Close both. Otherwise than in good order, this waits for no other rank."""
        for group in (self.saves, self.steps):
            if group is None:
                continue
            with contextlib.suppress(FerroError):
                if in_good_order and group.state == "open":
                    group.close()
                else:
                    group.abandon()
