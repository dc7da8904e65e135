"""The table of backends, from what `ferro conformance` wrote into docs/conformance/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

Survey: TypeAlias = Mapping[str, Any]

# Columns, and what it takes to measure one.
BACKENDS = {
    "simulated": "nothing",
    "gloo": "its distribution",
    "mpi": "an MPI and mpiexec",
    "nccl": "an NVIDIA GPU, CuPy and NCCL",
    "ucc": "libucc 1.1 to 1.8",
    "hybrid": "its distribution",
}
FEATURES = {
    "barrier": "barrier",
    "functions": "a function as reduction",
    "uneven": "uneven sizes",
    "objects": "Python values",
    "async": "`async_op`",
    "split": "`split`",
    "subgroup": "`subgroup`",
    "overlapping": "overlapping groups at once",
    "transfers": "`send`, `recv`",
    "tags": "tags in any order",
    "equal_bits": "equal bits on all ranks",
    "deterministic": "`deterministic=True`",
    "mismatch": "different calls are noticed",
    "timeout": "a rank that stays away",
    "abort": "`abort()`",
    "lost_peer": "a rank that dies",
    "shrink": "`shrink()` after it",
}
_ABSENT = "·"


def surveys(folder: Path) -> dict[str, Survey]:
    """Return what was found of each backend, by its name, in the order of the columns."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    return {name: found[name] for name in (*BACKENDS, *sorted(found)) if name in found}


def table(found: Mapping[str, Survey]) -> str:
    """Return the table with its notes."""
    names = list(dict.fromkeys((*BACKENDS, *found)))
    notes = _Notes()
    lines = [_row(["", *names]), _row(["---"] * (len(names) + 1))]
    for op in next(iter(found.values()))["collectives"]:
        label = "`sendrecv`" if op == "sendrecv" else f"`{op}`"
        lines.append(_row([label, *(_dtypes(found.get(name), op, notes) for name in names)]))
    lines.append(_row(["reductions", *(_reductions(found.get(name), notes) for name in names)]))
    for key, label in FEATURES.items():
        lines.append(_row([label, *(_feature(found.get(name), key, notes) for name in names)]))
    lines += ["", *notes.lines()]
    measured = "; ".join(_measured(name, found[name]) for name in names if name in found)
    lines += ["", f"Measured: {measured}."]
    absent = [f"{name} (needs {BACKENDS[name]})" for name in names if name not in found]
    if absent:
        lines += ["", f"{_ABSENT} not measured here: {', '.join(absent)}."]
    return "\n".join(lines)


class _Notes:
    """Numbered reasons, each told once."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}

    def mark(self, survey: Survey, *keys: str) -> str:
        """Return the mark for why this is refused; "" where no reason is known."""
        reason = next((survey["reasons"][key] for key in keys if key in survey["reasons"]), "")
        if not reason:
            return ""
        number = self._numbers.setdefault((survey["backend"], reason), len(self._numbers) + 1)
        return f" <sup>{number}</sup>"

    def lines(self) -> list[str]:
        """Return the notes."""
        return [f"{n}. {name}: {reason}" for (name, reason), n in self._numbers.items()]


def _dtypes(survey: Survey | None, op: str, notes: _Notes) -> str:
    if survey is None:
        return _ABSENT
    statuses = survey["collectives"][op]
    refused = [dtype for dtype, status in statuses.items() if status == "refused"]
    other = next((s for s in statuses.values() if s not in ("ok", "refused")), "")
    if other:
        return other
    keys = [op, *(f"{op}:{dtype}" for dtype in refused)]
    return _all_but(refused, len(statuses), notes.mark(survey, *keys) if refused else "")


def _reductions(survey: Survey | None, notes: _Notes) -> str:
    if survey is None:
        return _ABSENT
    statuses = survey["reductions"]
    refused = [name for name, by in statuses.items() if set(by.values()) == {"refused"}]
    keys = [f"{op}:{name}" for op in ("all_reduce", "reduce") for name in refused]
    return _all_but(refused, len(statuses), notes.mark(survey, *keys) if refused else "")


def _all_but(refused: list[str], count: int, mark: str) -> str:
    if not refused:
        return "all"
    return f"–{mark}" if len(refused) == count else f"all but {', '.join(refused)}{mark}"


def _feature(survey: Survey | None, key: str, notes: _Notes) -> str:
    if survey is None:
        return _ABSENT
    status = survey["features"].get(key, "unknown")
    keys = (key, "sendrecv") if key in ("transfers", "tags") else (key,)
    words = {"ok": "yes", "refused": f"–{notes.mark(survey, *keys)}", "unknown": "not asked"}
    return words.get(status, status)


def _measured(name: str, survey: Survey) -> str:
    versions = ", ".join(f"{part} {number}" for part, number in survey["versions"].items())
    what = name if survey["backend"] == name else f"{name} (as {survey['backend']})"
    return f"{what} with {survey['ranks']} ranks on {survey['device']} ({versions})"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
