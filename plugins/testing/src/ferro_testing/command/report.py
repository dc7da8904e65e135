"""Report: a survey as tables for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from ferro_testing.command.cells import COLUMNS, Status
from ferro_testing.command.rank import LARGE_BYTES, SMALL_BYTES
from ferro_testing.command.survey import Survey
from ferro_testing.differences import FEATURES, supported

_MARKS: Mapping[Status, str] = {"ok": "ok", "refused": "–", "wrong": "WRONG", "unknown": "?"}
_LEGEND = "ok: right, bit for bit · –: refused (UnsupportedError) · WRONG: see below · ?: not asked"
_WIDTH = 100
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")  # because "–1" would read as minus one


def report(survey: Survey) -> str:
    """Lay out a survey in lines of at most about a hundred characters."""
    parts = [_head(survey)]
    if survey.cells:
        reasons = survey.reasons()
        parts += [
            _collectives(survey, reasons),
            _reductions(survey),
            _features(survey, reasons),
            _timings(survey),
            _reasons(reasons),
        ]
    parts.append(_findings(survey.findings()))
    return "\n\n".join(filter(None, parts))


def _head(survey: Survey) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in survey.versions.items())
    return f"{survey.backend}: {survey.ranks} ranks, arrays on {survey.device}; {versions}"


def _collectives(survey: Survey, reasons: Mapping[str, str]) -> str:
    numbers = {key: str(index) for index, key in enumerate(reasons, 1)}
    table = survey.collectives()
    rows = [["", *COLUMNS]]
    for dtype in survey.dtypes:
        row = [dtype]
        for op in COLUMNS:
            status = table[op][dtype]
            note = next((n for key, n in numbers.items() if not supported([key], op, dtype)), "")
            row.append(_mark(status, note))
        rows.append(row)
    return _LEGEND + "\n\n" + _aligned(rows)


def _reductions(survey: Survey) -> str:
    table = survey.reductions()
    rows = [["by reduction", *table]]
    rows += [[dtype, *(_mark(table[name].get(dtype)) for name in table)] for dtype in survey.dtypes]
    return _aligned(rows)


def _mark(status: Status | None, note: str = "") -> str:
    """Return the mark of a status; for a refusal, with the number of its reason: "– ¹"."""
    if status is None:
        return ""
    if status == "refused" and note:
        return f"{_MARKS[status]} {note.translate(_RAISED)}"
    return _MARKS[status]


def _features(survey: Survey, reasons: Mapping[str, str]) -> str:
    numbers = {key: str(index) for index, key in enumerate(reasons, 1)}
    rows = []
    for name, status in survey.features().items():
        rows.append([name, _mark(status, numbers.get(name, "")), FEATURES.get(name, "")])
    return _aligned(rows)


def _timings(survey: Survey) -> str:
    if not survey.timings:
        return ""
    rows = [["rough times", f"{SMALL_BYTES >> 10} KiB", f"{LARGE_BYTES >> 20} MiB"]]
    for timing in survey.timings:
        large = "" if timing.large_s is None else f"{timing.large_s * 1e6:.0f} us"
        rows.append([timing.op, f"{timing.small_s * 1e6:.0f} us", large])
    return _aligned(rows) + "\n(medians of few calls on rank 0; `ferro bench` measures)"


def _reasons(reasons: Mapping[str, str]) -> str:
    lines: list[str] = []
    for number, (key, reason) in enumerate(reasons.items(), 1):
        lines += textwrap.wrap(f"{number}  {key}: {reason}", _WIDTH, subsequent_indent="   ")
    return "\n".join(["refused", *lines]) if lines else ""


def _findings(findings: Sequence[str]) -> str:
    if not findings:
        return "nothing is wrong"
    lines = ["1 finding" if len(findings) == 1 else f"{len(findings)} findings"]
    for text in findings:
        lines += ["", *textwrap.indent(text, "  ").splitlines()]
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def lines() -> Iterator[str]:
        for row in rows:
            yield "  ".join(map(str.ljust, row, widths)).rstrip()

    return "\n".join(lines())
