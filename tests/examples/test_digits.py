"""The demo's program runs alone, under ferro run and under torchrun's variables, and learns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

PROGRAM = str(Path(__file__).parents[2] / "examples" / "digits.py")
BIN = Path(sys.executable).parent
LIMIT_S = 120


def run(*command, **variables):
    """Run a command to its end; return what it printed."""
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def accuracy(output, ranks):
    """Return the held-out accuracy in percent that a run of this many ranks reports."""
    found = re.search(rf"world of {ranks} over \w+: held-out accuracy ([\d.]+)%", output)
    assert found, output
    return float(found[1])


def test_four_ranks_learn_the_digits_as_one_process_does(tmp_path):
    picture, trace = tmp_path / "demo.png", tmp_path / "trace.json"
    output = run(
        *(BIN / "ferro", "run", "-n", "4", "--trace", trace, PROGRAM),
        *("--epochs", "8", "--plot", picture, "--compare"),
    )
    assert accuracy(output, 4) >= 97
    difference = re.search(r"largest parameter difference from one process: (\S+)", output)
    assert float(difference[1]) < 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG")
    spans = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert {span["pid"] for span in spans} == {0, 1, 2, 3}
    assert "all_reduce" in {span["name"] for span in spans}


def test_it_runs_alone():
    assert accuracy(run(sys.executable, PROGRAM, "--epochs", "1"), 1) > 50


def test_it_runs_under_the_variables_of_torchrun(tmp_path):
    """torchrun's agent listens on MASTER_PORT itself; the ranks meet elsewhere."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2"}
    place |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    place |= {"TORCHELASTIC_RUN_ID": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            (sys.executable, PROGRAM, "--epochs", "1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=LIMIT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert accuracy(outputs[0], 2) > 50
