"""The example that stops and goes on: in the middle of an epoch, on another number of ranks."""

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "examples" / "interrupted.py"
FERRO = Path(sys.executable).parent / "ferro"


def run(*command):
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_it_goes_on_in_the_middle_of_an_epoch_on_other_ranks(tmp_path):
    options = ["--folder", tmp_path / "saved", "--epochs", "1", "--batch", "256"]
    first = run(FERRO, "run", "-n", "2", PROGRAM, *options, "--stop-after", "5")
    assert "stopped in epoch 0" in first
    second = run(sys.executable, PROGRAM, *options)
    assert "epoch 0, 1280 of 4096 items are done" in second
    accuracies = re.findall(r"epoch \d: loss [\d.]+, accuracy ([\d.]+) %", second)
    assert len(accuracies) == 1
    assert float(accuracies[0]) > 55
