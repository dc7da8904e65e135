"""Write the part of the results page about training, pipelines and parity."""

from __future__ import annotations

from collections.abc import Mapping

import parity
from records import Record, markdown_table

from ferro_bench import size_text, time_text

METHODS = {
    "training": """\
A multilayer perceptron in float32. Memory is the peak of what Python and NumPy allocated
(tracemalloc) on rank 0 over whole steps after the first, beside the bytes that training needs:
parameters, gradients, optimizer state and activations; for FSDP this rank's share of the first
three, and two gathered units. Step times are those of the slowest rank. All strategies take turns
in the same processes, with one thread each. The times include the arithmetic, which is not ferro's.
"alone" is ferro without strategy. "Collectives" is the time in a step during which a collective
ran; "hidden" is the part of it by which the step is not longer than "alone".""",
    "pipeline": """\
The idle share of a step ("bubble"), simulated and measured. The simulation takes the durations that
actions had when each rank computed by itself (all ranks at once), and messages without duration.
Measured is the share of the step in which ranks do not compute. "Arithmetic" computes perceptrons
in one thread; "device" waits instead of computing, for more ranks than this machine has cores.""",
    "parity": parity.METHOD,
}


def _training(result: Record) -> list[str]:
    parts = []
    for record in result["memory"]:
        rows = [[name.replace("_", " "), size_text(n)] for name, n in record["parts"].items()]
        rows.append(["sum of these", size_text(record["expected_bytes"])])
        peak = f"{size_text(record['peak_bytes'])} ({record['ratio']:.3f} x)"
        rows.append(["measured peak", peak])
        parts += [
            f"{record['strategy'].upper()}, {_setting(record)}",
            markdown_table(("memory of a rank", "size"), rows),
        ]
    for record in result["times"]:
        steps = record["steps"]
        alone = steps["alone"]["median_s"]
        rows = [
            [
                name,
                *(time_text(step[key]) for key in ("median_s", "min_s")),
                *_hidden(step, alone),
                _ratio_to_torch(name, steps),
            ]
            for name, step in steps.items()
        ]
        head = ("a step", "median", "min", "collectives", "hidden", "torch / ferro")
        parts += [_setting(record), markdown_table(head, rows)]
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
    visible = max(0.0, step["median_s"] - alone_s)
    return time_text(collectives), f"{max(0.0, 1 - visible / collectives):.0%}"


def _ratio_to_torch(name: str, steps: Mapping[str, Record]) -> str:
    torch = steps.get(f"torch-{name}")
    return f"{torch['median_s'] / steps[name]['median_s']:.2f}" if torch else ""


def _pipeline(result: Record) -> list[str]:
    head = (
        *("schedule", "stages computed by", "ranks", "stages a rank", "microbatches"),
        *("bubble, schedule", "measured", "step, schedule", "measured", "ratio"),
    )
    rows = []
    for record in result["records"]:
        simulated, measured = record["simulated"], record["measured"]
        rows.append(
            [
                *(record["schedule"], record["kind"]),
                *(str(record[key]) for key in ("ranks", "stages_per_rank", "microbatches")),
                *(f"{one['bubble']:.1%}" for one in (simulated, measured)),
                *(time_text(one["step_s"]) for one in (simulated, measured)),
                f"{measured['step_s'] / simulated['step_s']:.3f}",
            ]
        )
    return [markdown_table(head, rows)]


TABLES = {"training": _training, "pipeline": _pipeline, "parity": lambda result: [parity.table(result)]}
