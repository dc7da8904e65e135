"""The survey of a backend: all findings about it, for tables and for JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ferro.types import ReduceOp
from ferro_testing.command.cells import COLUMNS, Cell, Status, gaps
from ferro_testing.command.verdicts import FEATURES, CheckVerdict
from ferro_testing.differences import REDUCING

_STATUS: Mapping[str, Status] = {"ok": "ok", "refused": "refused", "wrong": "wrong", "skipped": "unknown"}
_NEED_TRANSFERS = ("transfers", "tags")  # features that need transfers


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Median seconds of a small and of a large call; None where size does not matter."""

    op: str
    small_s: float
    large_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All findings about a backend.

    Attributes:
        backend: its name.
        versions: of ferro, of the distribution that offers it and of the library below.
        ranks: number of ranks.
        device: device of the arrays of `cells`.
        dtypes: names of those that were tried.
        cells: every kind of call.
        verdicts: by name of the check.
        timings: of the collectives that work.
        failure: the reason for which no call could be tried, "" when they could.
    """

    backend: str
    versions: Mapping[str, str]
    ranks: int
    device: str
    dtypes: tuple[str, ...]
    cells: tuple[Cell, ...]
    verdicts: Mapping[str, CheckVerdict]
    timings: tuple[Timing, ...] = ()
    failure: str = ""

    def collectives(self) -> dict[str, dict[str, Status]]:
        """Return operation -> dtype -> status, which is refused only if all reductions are."""
        return {op: {dtype: self._status(op=op, dtype=dtype) for dtype in self.dtypes} for op in COLUMNS}

    def reductions(self) -> dict[str, dict[str, Status]]:
        """Return reduction -> dtype for which it is defined -> status, over all reducing operations."""
        found: dict[str, dict[str, Status]] = {}
        for name in ReduceOp:
            for cell in self.cells:
                if cell.op in REDUCING and cell.reduction == name:
                    statuses = {
                        other.status
                        for other in self.cells
                        if (other.dtype, other.reduction) == (cell.dtype, cell.reduction)
                    }
                    found.setdefault(name.value, {})[cell.dtype] = _worst(statuses)
        return found

    def features(self) -> dict[str, Status]:
        """Return feature -> status, of the barrier as well."""
        plain = {cell.op: cell.status for cell in self.cells if not cell.dtype}
        found: dict[str, Status] = {"barrier": plain.get("barrier", "unknown")}
        for name, check in FEATURES.items():
            verdict = self.verdicts.get(check.__name__)
            found[name] = "unknown" if verdict is None else _STATUS[verdict.status]
            if plain.get(name, "ok") != "ok":
                found[name] = plain[name]
        if "sendrecv" in gaps(self.cells):  # none of their checks ran
            found |= dict.fromkeys(_NEED_TRANSFERS, "refused")
        return found

    def reasons(self) -> dict[str, str]:
        """Return the reasons of all refusals, under the keys that `Case.unsupported` takes."""
        found = gaps(self.cells)
        for name, check in FEATURES.items():
            verdict = self.verdicts.get(check.__name__)
            if name not in found and verdict is not None and verdict.status == "refused":
                found[name] = verdict.text
        return found

    def findings(self) -> list[str]:
        """Describe all mistakes."""
        found = [self.failure] if self.failure else []
        found += dict.fromkeys(cell.text for cell in self.cells if cell.status == "wrong")
        found += [f"{verdict.name}: {verdict.text}" for verdict in self.verdicts.values() if verdict.status == "wrong"]
        return found

    def as_json(self) -> str:
        """Format the findings that hold on every machine: no times, no paths."""
        return json.dumps(
            {
                "backend": self.backend,
                "versions": dict(self.versions),
                "ranks": self.ranks,
                "device": self.device,
                "collectives": self.collectives(),
                "reductions": self.reductions(),
                "features": self.features(),
                "reasons": self.reasons(),
                "findings": self.findings(),
            },
            indent=1,
            ensure_ascii=False,
        )

    def _status(self, *, op: str, dtype: str) -> Status:
        statuses = {cell.status for cell in self.cells if (cell.op, cell.dtype) == (op, dtype)}
        usable = statuses - {"refused"}
        return _worst(usable or statuses)


def _worst(statuses: set[Status]) -> Status:
    order: Sequence[Status] = ("wrong", "unknown", "refused", "ok")
    return next((status for status in order if status in statuses), "unknown")
