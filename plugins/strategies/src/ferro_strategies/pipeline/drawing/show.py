"""`ferro show pipeline`: draws a schedule's timeline, and prints its bubble and activations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ferro import UsageError
from ferro.cli.parser import Parser

from ..schedules.build import build, expected_bubble, expected_peak_activations, names
from ..schedules.schedule import PipelineSchedule
from ..schedules.timeline import Timeline, simulate
from .svg import draw_svg
from .text import MIN_COLUMNS, draw_text


def show(arguments: Sequence[str]) -> int:
    """Draw the schedule that the command line asks for; return the exit status.

    Raises:
        UsageError: the command line is wrong, or the file cannot be written.
    """
    given = _parser().parse_args(arguments)
    if given.columns < MIN_COLUMNS:
        raise UsageError(f"--columns {given.columns}: must be {MIN_COLUMNS} or more")
    schedule = _schedule(given)
    weight = given.backward / 2 if given.weight is None else given.weight
    timeline = simulate(
        schedule, forward=given.forward, backward=given.backward, weight=weight, transfer=given.transfer
    )
    if not schedule.splits_backward:
        weight = 0.0
    expected = expected_bubble(schedule, forward=given.forward, backward=given.backward - weight, weight=weight)
    lines = [draw_text(timeline, columns=given.columns), "", *_figures(timeline, expected)]
    print("\n".join(lines))  # noqa: T201 - the command prints its result
    if given.svg is not None:
        _write(given.svg, draw_svg(timeline))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ferro show pipeline", description="Draw what each rank of a pipeline does when, before anything runs."
    )
    parser.add_argument("schedule", choices=names(), help="the order of the actions")
    number = parser.add_argument
    number("--stages", type=int, required=True, help="number of stages")
    number("--microbatches", type=int, required=True, help="number of microbatches")
    number("--ranks", type=int, help="number of ranks, of which STAGES is a multiple; one a stage")
    number("--forward", type=float, default=1.0, help="how long a stage's forward pass takes (1)")
    number("--backward", type=float, default=2.0, help="how long its backward pass takes (2)")
    number("--weight", type=float, help="the part of it for parameters' gradients (half)")
    number("--transfer", type=float, default=0.0, help="how long a message takes (0)")
    number("--columns", type=int, default=120, help=f"how wide to draw, {MIN_COLUMNS} or more (120)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a drawing, too")
    return parser


def _schedule(given: argparse.Namespace) -> PipelineSchedule:
    ranks = given.stages if given.ranks is None else given.ranks
    for option, count in (("--stages", given.stages), ("--ranks", ranks)):
        if count < 1:
            raise UsageError(f"{option} {count}: must be 1 or more")
    if given.stages % ranks:
        raise UsageError(
            f"--stages {given.stages} must be a multiple of the number of ranks, {ranks}: every rank has as many stages"
        )
    return build(given.schedule, ranks=ranks, stages_per_rank=given.stages // ranks, microbatches=given.microbatches)


def _figures(timeline: Timeline, expected: float | None) -> list[str]:
    """Return the bubble, the bubble by the formula, and a line for each rank."""
    schedule = timeline.schedule
    formula = "(p-1) / (m v + p-1)"
    if schedule.splits_backward:
        formula = "(p-1) (F+B-W) / (m v (F+B+W) + (p-1) (F+B-W))"
    value = "no formula is known for these numbers" if expected is None else f"{expected:.1%}"
    lines = [
        f"bubble   {timeline.bubble_fraction:.1%}",
        f"formula  {value}" + ("" if expected is None else f" = {formula}, messages taking no time"),
        f"time     {timeline.makespan:g}",
        "",
        "rank   idle   peak activations   promised",
    ]
    expected_peaks = expected_peak_activations(schedule)
    for rank, (idle, peak) in enumerate(zip(timeline.idle, timeline.peak_activations, strict=True)):
        lines.append(f"{rank:>4}  {idle:>5.1%}   {peak:>16}   {expected_peaks[rank]:>8}")
    return lines


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise UsageError(f"--svg {path}: cannot be written: {exc.strerror}") from exc
