"""Trace: every operation of this rank as a Chrome trace, to be seen in Perfetto.

`ferro run --trace out.json` gives each rank a directory; at the end the launcher puts the parts
together. A rank is a process there, a lane (see `ferro.work`) a thread.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from ferro.observers import Event


class Trace:
    """An observer that writes `rank<r>.json` into a directory when it is closed."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        self._events: list[Event] = []
        self._lock = threading.Lock()

    def started(self, event: Event) -> None:
        """Do nothing: the end knows when it began."""

    def finished(self, event: Event) -> None:
        """Keep the operation."""
        with self._lock:
            self._events.append(event)

    def close(self) -> None:
        """Write the file, whole or not at all."""
        with self._lock:
            events = self._events
        if not events:
            return
        rank = events[0].global_rank
        threads = {name: i for i, name in enumerate(dict.fromkeys(e.thread for e in events))}
        names: list[dict[str, object]] = [_name("process_name", rank, 0, f"rank {rank}")]
        names += [_name("thread_name", rank, tid, name) for name, tid in threads.items()]
        spans = [_span(event, rank, threads[event.thread]) for event in events]
        self._directory.mkdir(parents=True, exist_ok=True)
        part = self._directory / f"rank{rank}.json"
        draft = part.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps({"traceEvents": names + spans}))
        draft.replace(part)


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _span(event: Event, pid: int, tid: int) -> dict[str, object]:
    return {
        "ph": "X",
        "cat": event.group,
        "name": event.op,
        "pid": pid,
        "tid": tid,
        "ts": event.start_s * 1e6,
        "dur": event.seconds * 1e6,
        "args": {"seq": event.seq, "bytes": event.nbytes, "error": event.error},
    }
