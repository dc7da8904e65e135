"""Traces: each rank writes its operations as a Chrome trace; the launcher joins them.

`ferro run --trace out.json` gives the ranks a directory, in which each rank's observer writes its
part. In the file, which Perfetto shows, a rank is a process, and each of a group's executors is a
thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Iterable
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


def part_path(directory: Path, rank: int) -> Path:
    """Where a rank writes its part: {"traceEvents": [...]}."""
    return directory / f"rank{rank}.json"


def merge_parts(directory: Path, ranks: Iterable[int], target: Path) -> list[str]:
    """Write the events of all parts to `target`, which appears whole or not at all.

    Args:
        directory: where the parts are.
        ranks: whose parts to look for.
        target: the file to write.

    Returns:
        What is amiss, a line for each part that is absent or malformed; such parts are left out.

    Raises:
        OSError: `target` cannot be written.
    """
    amiss = []
    events: list[object] = []
    for rank in ranks:
        try:
            part = json.loads(part_path(directory, rank).read_bytes())
            found = part["traceEvents"]
            if not isinstance(found, list):
                raise TypeError("traceEvents is not a list")
        except FileNotFoundError:
            amiss.append(f"rank {rank} wrote no trace: it made no collective call, or ended badly")
        except (OSError, ValueError, KeyError, TypeError) as exc:
            amiss.append(f"the trace of rank {rank} is left out, it is malformed: {exc!r}")
        else:
            events += found
    _write_atomically(target, json.dumps({"traceEvents": events}))
    return amiss


def _write_atomically(target: Path, text: str) -> None:
    descriptor, draft = tempfile.mkstemp(dir=target.absolute().parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        # mkstemp makes files that only the owner can read; a trace is an ordinary file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(draft, 0o666 & ~mask)
        os.replace(draft, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
