"""GroupState: whether a group can be used, and the errors that say why not."""

from __future__ import annotations

import os
import weakref
from typing import NoReturn

from ferro.collectives.fast_path import BUSY
from ferro.errors import FerroError, GroupClosed, UsageError
from ferro.group.group_info import GroupInfo

_states: weakref.WeakSet[GroupState] = weakref.WeakSet()


def _mark_forked() -> None:
    for state in list(_states):
        state.forked = True
        state.word[BUSY] = 1


os.register_at_fork(after_in_child=_mark_forked)


class GroupState:
    """The state of one group on one rank: open, dead, closed, or a forked child's copy.

    Attributes:
        failure, closed: the error that ended the group; True once it is closed.
        forked: True in a process that was forked from the one whose group it is.
        word: `Turn.state`; `word[BUSY]` is 1 where no operation can be issued any more.
    """

    def __init__(self, info: GroupInfo, rank: int, word: memoryview) -> None:
        self.failure: FerroError | None = None
        self.closed = False
        self.forked = False
        self.word = word
        self._info = info
        self._rank = rank
        self._pid = os.getpid()
        _states.add(self)

    @property
    def name(self) -> str:
        return "closed" if self.closed else "dead" if self.failure else "open"

    def fail(self, cause: FerroError) -> None:
        self.failure = self.failure or cause  # the first one counts
        self.word[BUSY] = 1

    def close(self) -> None:
        self.closed = True
        self.word[BUSY] = 1

    def raise_closed(self, op: str) -> NoReturn:
        name = self._info.name
        if self.closed:
            raise GroupClosed(f"{op} on group {name!r}: the group was closed", op=op, group=name)
        if self.forked:
            message = (
                f"this process was forked from process {self._pid}, whose connections it must not use: "
                "start ranks with `ferro run`, and workers with multiprocessing's 'spawn'"
            )
            raise UsageError(f"{op} on group {name!r}: {message}", op=op, group=name)
        self.raise_dead(op)

    def raise_dead(self, op: str) -> NoReturn:
        name = self._info.name
        message = f"{op} on group {name!r}: the group died earlier: {self.failure}"
        raise GroupClosed(message, op=op, group=name, rank=self._rank) from self.failure
