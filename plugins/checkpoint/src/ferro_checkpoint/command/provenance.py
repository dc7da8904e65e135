"""Of which step a checkpoint is, and who has saved it when."""

from __future__ import annotations

from datetime import UTC, datetime

from ferro_checkpoint.command.text import count
from ferro_checkpoint.layout.record import Record


def about(record: Record) -> str:
    """Say it in a line."""
    by = record.saved_by
    ranks = by.get("world_size")
    parts = ["checkpoint" if record.step is None else f"checkpoint of step {record.step}"]
    if saved_at(record):
        parts.append(f"saved {saved_at(record)}")
    if type(ranks) is int:
        parts.append(f"by {count(ranks, 'rank')}")
    return " ".join(parts)


def saved_at(record: Record) -> str:
    """Return the time of the commit, "" if the record has none."""
    seconds = record.saved_by.get("time_s", record.saved_by.get("time"))
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""
