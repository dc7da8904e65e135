"""The GPT example: cut in every way it offers, it trains as in one process, and writes text."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt.py"
DEADLINE_S = 120
SMALL = [
    "--steps=50",
    "--dim=32",
    "--heads=4",
    "--blocks=2",
    "--context=32",
    "--dtype=float64",
    "--write=40",
]


def run_example(ranks, *arguments):
    launch = [sys.executable, "-m", "ferro", "run", "-n", str(ranks), str(EXAMPLE)]
    ended = subprocess.run(
        [*launch, *SMALL, *arguments], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line.removeprefix("[0] ") for line in ended.stdout.splitlines()]
    [about] = [line for line in lines if ": loss" in line]
    [compared] = [line for line in lines if line.startswith("largest relative difference")]
    written = "\n".join(lines[lines.index(about) + 1 : lines.index(compared)])
    return about, written, float(compared.rpartition(" ")[2])


@pytest.mark.parametrize(
    ("ranks", "cuts"),
    [
        (8, "--dp=2 --tp=2 --pp=2"),
        (8, "--dp=2 --tp=2 --pp=2 --fsdp"),
        (8, "--dp=2 --tp=2 --pp=2 --fsdp --schedule=zb_h1 --microbatches=4"),
        (3, "--pp=3 --microbatches=5"),
    ],
    ids=["replicated", "sharded", "zero bubble", "uneven stages"],
)
def test_losses_of_fifty_steps_are_those_of_one_process(ranks, cuts):
    about, written, difference = run_example(ranks, "--compare", *cuts.split())
    first, last = (
        float(word) for word in about.split() if word.replace(".", "").isdecimal() and "." in word
    )
    assert last < 0.75 * first
    assert difference < 1e-5
    assert written.startswith("The ")
    assert len(written) == len("The ") + 40
