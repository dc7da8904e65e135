"""Provide the parts that all benchmarks share: machine facts, JSON records, Markdown tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

# A record read from JSON: numbers and strings, and records and lists of them.
Record: TypeAlias = Mapping[str, object]

_PACKAGES = ("ferro", "numpy", "torch")


def machine_facts() -> dict[str, object]:
    """Return the machine and the versions that a result depends on, without names and paths."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "system": platform.system(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is aligned left and the others right."""
    lines = [head, ["---:" if index else "---" for index in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def integers(text: str) -> list[int]:
    """Parse integers that are separated by commas."""
    return [int(part) for part in text.split(",")]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
