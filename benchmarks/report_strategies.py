"""The strategies' part of the results page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import parity
from markdown import table

from ferro_bench import size_text, time_text

Record: TypeAlias = Mapping[str, object]

HOW = {
    "training": """\
A multilayer perceptron in float32. Memory is the peak of what Python and NumPy allocated
(tracemalloc) on rank 0 over whole steps after the first, beside what must be there: parameters,
gradients, optimizer state and activations; for FSDP this rank's share of the first three, and two
gathered units. Step times are those of the slowest rank, all strategies taking turns in the same
processes, one thread each; they include the arithmetic, which is not ferro's. "alone" is ferro
without strategy. "Collectives" is how long some collective was under way in a step, by the trace;
"hidden" is the part of it by which the step is not longer than "alone".""",
    "pipeline": """\
The idle share of a step ("bubble"): as the schedule has it, simulated with the durations that its
actions had when each rank computed by itself (all ranks at once), messages taking no time; and
measured: the share of the step in which ranks do not compute. "Arithmetic" computes perceptrons in
one thread; "device" waits instead of computing, for more ranks than this machine has cores.""",
    "parity": parity.HOW,
}


def _training(result: Record) -> list[str]:
    parts = []
    for record in result["memory"]:
        rows = [[name.replace("_", " "), size_text(n)] for name, n in record["parts"].items()]
        rows.append(["all of these", size_text(record["expected_bytes"])])
        peak = f"{size_text(record['peak_bytes'])} ({record['ratio']:.3f} x)"
        rows.append(["measured peak", peak])
        parts += [
            f"{record['strategy'].upper()}, {_setting(record)}",
            table(("memory of a rank", "size"), rows),
        ]
    for record in result["times"]:
        steps = record["steps"]
        alone = steps["alone"]["median_s"]
        rows = [
            [
                name,
                *(time_text(step[key]) for key in ("median_s", "min_s")),
                *_hidden(step, alone),
                *_faster(name, steps),
            ]
            for name, step in steps.items()
        ]
        head = ("a step", "median", "min", "collectives", "hidden", "torch / ferro")
        parts += [_setting(record), table(head, rows)]
    return parts


def _setting(record: Record) -> str:
    millions = record["parameters"] / 1e6
    return (
        f"{millions:.1f} million parameters (layers {record['widths']}), batch "
        f"{record['batch']} a rank, {record['optimizer']}, {record['ranks']} ranks."
    )


def _hidden(step: Record, alone_s: float) -> tuple[str, str]:
    collectives = step["collectives_s"]
    if not collectives:
        return "", ""
    shown = max(0.0, step["median_s"] - alone_s)
    return time_text(collectives), f"{max(0.0, 1 - shown / collectives):.0%}"


def _faster(name: str, steps: Mapping[str, Record]) -> tuple[str]:
    theirs = steps.get(f"torch-{name}")
    return (f"{theirs['median_s'] / steps[name]['median_s']:.2f}" if theirs else "",)


def _pipeline(result: Record) -> list[str]:
    head = (
        *("schedule", "stages computed by", "ranks", "stages a rank", "microbatches"),
        *("bubble, schedule", "measured", "step, schedule", "measured", "ratio"),
    )
    rows = []
    for record in result["records"]:
        told, found = record["simulated"], record["measured"]
        rows.append(
            [
                *(record["schedule"], record["kind"]),
                *(str(record[key]) for key in ("ranks", "stages_per_rank", "microbatches")),
                *(f"{one['bubble']:.1%}" for one in (told, found)),
                *(time_text(one["step_s"]) for one in (told, found)),
                f"{found['step_s'] / told['step_s']:.3f}",
            ]
        )
    return [table(head, rows)]


def _parity(result: Record) -> list[str]:
    return [parity.table(result)]


TABLES = {"training": _training, "pipeline": _pipeline, "parity": _parity}
