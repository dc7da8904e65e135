"""ObserverNotifier: tells the observers of a group of the start and the end of its operations."""

from __future__ import annotations

import threading
import time
import warnings
from dataclasses import replace

from ferro.collectives.label import Call
from ferro.group.group_info import GroupInfo
from ferro.observers import Event, Observer


class ObserverNotifier:
    """Notifies the observers of one group on one rank; one that raises does not disturb the operation."""

    def __init__(self, info: GroupInfo, rank: int) -> None:
        self._info = info
        self._rank = rank

    def started(self, call: Call, nbytes: int) -> Event:
        """Tell of the start of an operation in this thread; return its description, for `finished`."""
        event = Event(
            op=call.op,
            seq=call.seq,
            group=self._info.name,
            rank=self._rank,
            global_rank=self._info.global_ranks[self._rank],
            nbytes=nbytes,
            start_s=time.time(),
            thread=threading.current_thread().name,
        )
        for observer in self._info.observers:
            try:
                observer.started(event)
            except Exception as error:  # noqa: BLE001 - whatever a stranger's observer meets
                _warn(observer, event, error)
        return event

    def finished(self, event: Event, seconds: float, error: str) -> None:
        """Tell of the end of an operation; `error` names the class of the error that ended it, or is empty."""
        event = replace(event, seconds=seconds, error=error)
        for observer in self._info.observers:
            try:
                observer.finished(event)
            except Exception as problem:  # noqa: BLE001 - whatever a stranger's observer meets
                _warn(observer, event, problem)


def _warn(observer: Observer, event: Event, error: Exception) -> None:
    warnings.warn(
        f"observer {type(observer).__name__} failed at {event.op} #{event.seq}: {type(error).__name__}: {error}",
        RuntimeWarning,
        stacklevel=3,
    )
