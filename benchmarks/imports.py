"""Time imports, each in a fresh interpreter; the programs take turns.

Every program prints its own seconds, so they do not include the interpreter's start. A warm-up
round first compiles bytecode and brings the files into the page cache.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

_PROGRAMS = {"numpy": "import numpy", "ferro": "import ferro", "available": "ferro.backends.available()"}
_BEFORE = {"available": "import ferro"}
_MEASURE = """
import time
{before}
start = time.perf_counter()
{timed}
print(time.perf_counter() - start)
"""
_DEADLINE_S = 60.0

# The promised limits, in seconds.
LIMITS = {"import ferro minus import numpy": 0.030, "ferro.backends.available()": 0.050}


def measure(rounds: int) -> list[dict[str, object]]:
    """Return a record for each limit: its name, and median, minimum and limit in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in _PROGRAMS}
    with tempfile.TemporaryDirectory() as bytecode:
        for turn in range(-1, rounds):
            for name in _PROGRAMS if turn % 2 else reversed(_PROGRAMS):
                elapsed_s = _run(name, bytecode)
                if turn >= 0:
                    seconds[name].append(elapsed_s)
    return [
        _record("import ferro minus import numpy", seconds["ferro"], seconds["numpy"]),
        _record("ferro.backends.available()", seconds["available"], [0.0]),
    ]


def _record(name: str, seconds: list[float], baseline: list[float]) -> dict[str, object]:
    return {
        "name": name,
        "median_s": statistics.median(seconds) - statistics.median(baseline),
        "min_s": min(seconds) - min(baseline),
        "limit_s": LIMITS[name],
        "rounds": len(seconds),
    }


def _run(name: str, bytecode: str) -> float:
    program = _MEASURE.format(before=_BEFORE.get(name, ""), timed=_PROGRAMS[name])
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=_DEADLINE_S,
        # Python writes bytecode, as it does for users, whatever this environment says.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": bytecode},
    )
    return float(ended.stdout)
