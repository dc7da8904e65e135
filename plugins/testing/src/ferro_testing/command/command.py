"""`ferro conformance`: try a backend, print the findings, and write them to a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from importlib_metadata import version

from ferro import backends
from ferro.errors import BackendUnavailable, PluginError, UnsupportedError, UsageError
from ferro.launch.processes import exit_on_signals
from ferro.types import Device
from ferro_testing.case import Case
from ferro_testing.command.cells import Cell, all_cells, gaps, merge
from ferro_testing.command.options import ConformanceOptions
from ferro_testing.command.rank import probe
from ferro_testing.command.report import report
from ferro_testing.command.survey import Survey, Timing
from ferro_testing.command.verdicts import CheckVerdict, judge
from ferro_testing.outcome import Outcome, RanksFailed
from ferro_testing.samples import BFLOAT16

_UNAVAILABLE_STATUS = 2


def run(options: ConformanceOptions) -> int:
    """Try the backend; return the exit status: 0, 1 with findings, 2 when it cannot be used.

    Raises:
        UsageError: the file for the results cannot be written.
    """
    try:
        with exit_on_signals():
            survey = _survey(options)
    except (BackendUnavailable, PluginError) as error:
        _print(sys.stderr, f"ferro: {error}")
        return _UNAVAILABLE_STATUS
    _print(sys.stderr if options.json == "-" else sys.stdout, report(survey))
    _write_results(options, survey)
    return 1 if survey.findings() else 0


def _survey(options: ConformanceOptions) -> Survey:
    """Try everything.

    Raises:
        BackendUnavailable: nothing can be tried.
        PluginError: a plugin could not be loaded.
    """
    info = backends.get(options.backend)
    available = backends.probe(info)
    if not available.ok:
        raise BackendUnavailable(options.backend, available.reason, available.hint)
    versions = {"ferro": version("ferro")}
    if available.version:
        versions[options.backend] = available.version
    case = Case(backend=options.backend, world_sizes=(options.ranks,), timeout_s=options.timeout_s)
    if BFLOAT16 not in case.dtypes:
        _print(sys.stderr, f"{BFLOAT16} was not asked for: ml_dtypes is not installed")
    device = options.device or info.devices[0]
    cells, timings, failure = _probe(case, options.ranks, device)
    verdicts: Mapping[str, CheckVerdict] = {}
    if not failure:
        verdicts = judge(_with_gaps(case, cells), launched=info.launcher is not None, quick=options.quick, told=_show)
    return Survey(
        backend=options.backend,
        versions=versions,
        ranks=options.ranks,
        device=device,
        dtypes=case.dtypes,
        cells=tuple(cells),
        verdicts=verdicts,
        timings=tuple(timings),
        failure=failure,
    )


def _probe(case: Case, ranks: int, device: Device) -> tuple[list[Cell], list[Timing], str]:
    """Make every call once; return the cells, timings, and the reason where there are none."""
    cells = all_cells(case.dtypes)
    calls = [[cell.op, cell.dtype, cell.reduction] for cell in cells]
    _print(sys.stderr, f"{len(calls)} kinds of calls on {ranks} ranks …")
    outcomes = case.outcomes(probe, ranks, calls, str(device))
    if not all(outcome.ok for outcome in outcomes):
        _require_available(case.backend, outcomes)
        return [], [], str(RanksFailed("the calls could not be tried", outcomes))
    told: list[Any] = [outcome.result for outcome in outcomes]
    timings = [Timing(op=op, small_s=small, large_s=large) for op, small, large in told[0]["timings"]]
    return merge(cells, [rank["cells"] for rank in told]), timings, ""


def _require_available(name: str, outcomes: Sequence[Outcome]) -> None:
    """Raise when the backend could not be used on the ranks, which is no fault of the backend.

    One rank without the backend is enough: the other ranks' errors are a consequence.

    Raises:
        BackendUnavailable: with the reason that the ranks gave.
    """
    absent = [it for it in outcomes if it.error_type == BackendUnavailable.__name__]
    if not absent and any(it.error_type != UnsupportedError.__name__ for it in outcomes):
        return
    first = (absent or outcomes)[0]
    words = first.error_text.rpartition(f"{first.error_type}: ")[2].strip().partition("\n")[0]
    words = words.removeprefix(str(BackendUnavailable(name, "")).removesuffix("."))
    raise BackendUnavailable(name, f"on its ranks: {words.rstrip('.')}")


def _with_gaps(case: Case, cells: Sequence[Cell]) -> Case:
    """Return the case with all refusals declared, as the backend's author would declare them."""
    found = {key: text or "it gives no reason" for key, text in gaps(cells).items()}
    return replace(case, unsupported=found)


def _show(verdict: CheckVerdict) -> None:
    reason = f": {verdict.text.splitlines()[0]}" if verdict.text else ""
    _print(sys.stderr, f"{verdict.name:<28} {verdict.status:<8} {verdict.seconds:5.1f} s{reason}")


def _write_results(options: ConformanceOptions, survey: Survey) -> None:
    if options.json is None:
        return
    text = survey.as_json()
    if options.json == "-":
        _print(sys.stdout, text)
        return
    try:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    except OSError as exc:
        raise UsageError(f"--json {options.json}: {exc.strerror}") from exc


def _print(stream: TextIO, line: str) -> None:
    print(line, file=stream, flush=True)
