"""The GPT example: cut in every way it offers, it trains as in one process, and writes text."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt.py"
DEADLINE_S = 120
SMALL = ["--dim=32", "--heads=4", "--blocks=2", "--context=32", "--dtype=float64", "--write=40"]


def launch(ranks, *arguments):
    command = [sys.executable, "-m", "ferro", "run", "-n", str(ranks), str(EXAMPLE)]
    return subprocess.run([*command, *SMALL, *arguments], capture_output=True, text=True, timeout=DEADLINE_S)


def run_example(ranks, *arguments):
    ended = launch(ranks, *arguments)
    assert ended.returncode == 0, ended.stderr
    lines = [line.removeprefix("[0] ") for line in ended.stdout.splitlines()]
    [about] = [line for line in lines if ": loss" in line]
    [compared] = [line for line in lines if line.startswith("largest relative difference")]
    written = "\n".join(lines[lines.index(about) + 1 : lines.index(compared)])
    return about, written, float(compared.rpartition(" ")[2])


@pytest.mark.parametrize(
    ("ranks", "steps", "cuts"),
    [
        (8, 4, "--dp=2 --tp=2 --pp=2 --fsdp --schedule=zb_h1 --microbatches=4"),
        (3, 4, "--pp=3 --microbatches=5"),
        (2, 25, "--pp=2 --stages-per-rank=2 --schedule=interleaved_1f1b"),
    ],
    ids=["sharded, zero bubble", "uneven stages", "interleaved"],
)
def test_losses_are_those_of_one_process(ranks, steps, cuts):
    about, written, difference = run_example(ranks, "--compare", f"--steps={steps}", *cuts.split())
    first, last = (float(word) for word in about.split() if word.replace(".", "").isdecimal() and "." in word)
    assert last < (0.9 if steps == 25 else 1) * first
    assert difference < 1e-5
    assert written.startswith("The ")
    assert len(written) == len("The ") + 40


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ("--dp=2 --tp=2", "--dp x --pp x --tp is 4 ranks, not 2: -n 4"),
        ("--dp=2 --batch=33", "--batch must be a multiple of --dp"),
        ("--pp=2 --stages-per-rank=4", "--pp x --stages-per-rank must be at most 6, --blocks and 2"),
        ("--tp=2 --heads=1", "--tp must be at most --heads"),
        ("--dp=2 --dim=30", "--dim must be a multiple of --heads"),
        ("--dp=2 --steps=0", "--steps must be at least 1"),
        ("--dp=2 --stages-per-rank=0", "--stages-per-rank must be at least 1"),
        ("--dp=2 --temperature=0", "--temperature must be above 0"),
        ("--dp=2", None),
    ],
)
def test_options_that_make_no_sense_are_told(monkeypatch, options, fault):
    example = runpy.run_path(str(EXAMPLE))
    monkeypatch.setattr(sys, "argv", ["gpt.py", *options.split()])
    assert example["fault_of"](example["parse"](), 2) == fault


def test_a_world_of_another_size_is_one_line_of_one_rank():
    ended = launch(2, "--dp=4")
    assert ended.returncode == 1
    told = [line for line in ended.stderr.splitlines() if not line.startswith("ferro run:")]
    assert told == ["[0] gpt.py: --dp x --pp x --tp is 4 ranks, not 2: -n 4"]
