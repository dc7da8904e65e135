"""KeptGather: the all_gather of a flat parameter whose unsharded memory is kept, as a persistent operation."""

from __future__ import annotations

from typing import Protocol

from ferro import ProcessGroup

from ..nn.arrays import Array

# A small persistent operation that was started ends in `wait()`, or with the group's next collective. After a failed
# pass nobody waits, and the shard, a part of the memory that it fills, may change before that. Larger ones, and
# ordinary asynchronous ones, end by themselves.
PERSISTENT_BYTES = 4 << 20


class Gather(Protocol):
    """A gather under way."""

    def wait(self) -> object:
        """Wait until everything is gathered; raises its error."""


class _Repeatable(Protocol):
    """A persistent operation (see `ProcessGroup.persistent`)."""

    def __call__(self) -> object: ...
    def start(self) -> None: ...
    def wait(self) -> object: ...


class KeptGather:
    """Gathers shards into memory that stays, again and again.

    The group compares the operation over all ranks when it is made: where they gather for the first time.

    Args:
        group: the ranks that own the shards.
        shard: this rank's part of `unsharded`.
        unsharded: the memory.
    """

    def __init__(self, group: ProcessGroup, shard: Array, unsharded: Array) -> None:
        self._group = group
        self._shard = shard
        self._unsharded = unsharded
        self._operation: _Repeatable | None = None
        self._under_way = False

    def run(self) -> None:
        """Gather before this returns."""
        self.wait()
        self._made()()

    def start(self) -> None:
        """Start to gather; a gather that nobody has waited for, since its pass failed, ends before."""
        self.wait()
        self._made().start()
        self._under_way = True

    def wait(self) -> None:
        """Wait for the gather under way, if there is one."""
        under_way, self._under_way = self._under_way, False
        if under_way:
            self._made().wait()

    def _made(self) -> _Repeatable:
        if self._operation is None:
            self._operation = self._group.persistent("all_gather", self._shard, out=self._unsharded)
        return self._operation
