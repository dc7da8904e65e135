"""Traces: each rank writes its operations as a Chrome trace; the launcher joins them.

`ferro run --trace out.json` gives the ranks a directory, in which each rank's observer writes its part. In the file,
which Perfetto shows, a rank is a process, and each of a group's executors is a thread.
"""

from __future__ import annotations

import json
import secrets
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from ferro.errors import UsageError
from ferro.observers import Event


class Trace:
    """An observer that writes `rank<r>.json` into a directory when it is closed."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        self._events: list[Event] = []
        self._lock = threading.Lock()

    def started(self, event: Event) -> None:
        """Do nothing: the event of the end has the start time, too."""

    def finished(self, event: Event) -> None:
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
        lines: list[dict[str, object]] = [
            {"ph": "M", "name": kind, "pid": rank, "tid": tid, "args": {"name": name}}
            for kind, tid, name in [
                ("process_name", 0, f"rank {rank}"),
                *(("thread_name", tid, name) for name, tid in threads.items()),
            ]
        ]
        for event in events:
            args = {"seq": event.seq, "bytes": event.nbytes, "error": event.error}
            place = {"cat": event.group, "name": event.op, "pid": rank, "tid": threads[event.thread]}
            lines.append({"ph": "X", **place, "ts": event.start_s * 1e6, "dur": event.seconds * 1e6, "args": args})
        self._directory.mkdir(parents=True, exist_ok=True)
        _write_whole(part_path(self._directory, rank), {"traceEvents": lines})


def parts_directory() -> tempfile.TemporaryDirectory[str]:
    """Make the directory for the parts, and remove it at the end of the context."""
    try:
        return tempfile.TemporaryDirectory(prefix="ferro-trace-")
    except OSError as exc:
        raise UsageError(
            f"--trace needs a temporary directory: {exc}; set TMPDIR to one that can be written to"
        ) from exc


def part_path(directory: Path, rank: int) -> Path:
    """Return the file of a rank's part: {"traceEvents": [...]}."""
    return directory / f"rank{rank}.json"


def merge_parts(directory: Path, ranks: Iterable[int], target: Path) -> list[str]:
    """Write the events of all parts to `target`, which appears whole or not at all; return a line for each problem.

    A problem is a part that is absent or malformed, which is left out, or a `target` that cannot be written.
    """
    problems = []
    events: list[object] = []
    for rank in ranks:
        try:
            found = json.loads(part_path(directory, rank).read_bytes())["traceEvents"]
            if not isinstance(found, list):
                raise TypeError("traceEvents is not a list")
        except FileNotFoundError:
            problems.append(f"rank {rank} wrote no trace: it made no collective call, or ended badly")
        except (OSError, ValueError, KeyError, TypeError) as exc:
            problems.append(f"the trace of rank {rank} is left out, it is malformed: {exc!r}")
        else:
            events += found
    try:
        _write_whole(target, {"traceEvents": events})
    except OSError as exc:  # a trace that cannot be written does not fail the job
        problems.append(f"the trace could not be written: {exc}")
    return problems


def _write_whole(target: Path, content: dict[str, object]) -> None:
    if target.exists() and not target.is_file():  # a device or a pipe is written to, and never replaced
        target.write_text(json.dumps(content))
        return
    target = target.resolve()  # a link stays one
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with draft.open("x") as file:
            json.dump(content, file)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
