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
three, and two gathered units.

Step times are those of the slowest rank. All strategies take turns in the same processes, with one
thread each. "alone" is a step of that library without a strategy, each rank for itself: the
arithmetic, which is NumPy's or torch's. So ferro's times cannot be compared with torch's; what a
strategy adds to its own library's "alone" can, and this overhead is the first column. torch's DDP
has `gradient_as_bucket_view=True`, its FSDP is `fully_shard` of every layer.
"Collectives" is the time in a step during which one of ferro's collectives ran; "hidden" is the
part of it by which the step is not longer than "alone". Both are from a run of their own, with an
observer, whose collectives take the longer way through the group.""",
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
        rows = [
            [
                name if name.startswith("torch-") else f"ferro-{name}",
                overhead_text(name, steps),
                *(time_text(step[key]) for key in ("median_s", "min_s")),
                *_hidden(name, record["observed"]),
            ]
            for name, step in steps.items()
        ]
        head = ("a step", "overhead over alone", "median", "min", "collectives", "hidden")
        parts += [_setting(record), markdown_table(head, rows)]
    return parts


def overhead_text(name: str, steps: Mapping[str, Record]) -> str:
    """Return how much longer a step is than the same library's without a strategy, as a percentage."""
    alone = steps["torch-alone" if name.startswith("torch-") else "alone"]
    share = steps[name]["median_s"] / alone["median_s"] - 1
    return "" if steps[name] is alone else f"{share:.0%}"


def _setting(record: Record) -> str:
    millions = record["parameters"] / 1e6
    return (
        f"{millions:.1f} million parameters (layers {record['widths']}), batch "
        f"{record['batch']} a rank, {record['optimizer']}, {record['ranks']} ranks."
    )


def _hidden(name: str, steps: Mapping[str, Record]) -> tuple[str, str]:
    """Return the time of a step's collectives, and the share of it by which the step is not longer."""
    collectives = steps[name]["collectives_s"] if name in steps else 0
    if not collectives:
        return "", ""
    visible = max(0.0, steps[name]["median_s"] - steps["alone"]["median_s"])
    return time_text(collectives), f"{max(0.0, 1 - visible / collectives):.0%}"


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
