"""The benchmarks run, check what they compute, and write what they promise. No time is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DEADLINE_S = 60


def run_benchmarks(folder, *arguments):
    program = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--without-torch"]
    return subprocess.run(
        [*program, f"--out={folder}", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def test_collectives_are_measured_and_reported(tmp_path):
    ended = run_benchmarks(tmp_path, "--only=collectives", "--sizes=4,64K", "--ranks=2")
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "collectives.json").read_text())
    measured = [
        (r["ranks"], r["nbytes"]) for r in result["records"] if r["collective"] == "all_reduce"
    ]
    assert measured == [(2, 4), (2, 65536)]
    assert {r["collective"] for r in result["records"]} == {
        "all_reduce",
        "broadcast",
        "all_gather",
        "reduce_scatter",
    }
    for record in result["records"]:
        assert 0 < record["ferro"]["min_s"] <= record["ferro"]["median_s"]
    page = (tmp_path / "README.md").read_text()
    assert "### all_reduce, 2 ranks" in page
    assert "| 64 KiB | " in page


def test_facts_name_versions_but_neither_host_nor_path(tmp_path):
    ended = run_benchmarks(tmp_path, "--only=imports")
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "imports.json").read_text())
    assert set(result["machine"]) == {
        *("date", "system", "cpu", "cores", "python"),
        *("ferro", "numpy", "torch"),
    }
    assert [r["limit_s"] for r in result["records"]] == [0.03, 0.05]


@pytest.mark.parametrize("size", ["0", "64X", "-4", "K"])
def test_a_wrong_size_is_refused(tmp_path, size):
    ended = run_benchmarks(tmp_path, f"--sizes={size}")
    assert ended.returncode == 2
    assert "--sizes" in ended.stderr


WRONG = """
import sys
sys.path.insert(0, sys.argv[1])
import ferro
from collectives import case_of, measure

class Careless:
    name = "careless"

    def operation(self, collective, source, target):
        return lambda: None

with ferro.init() as group:
    measure(case_of(sys.argv[2], 1024, quick=True), [Careless()], group)
"""


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "reduce_scatter"])
def test_a_wrong_result_is_an_error(tmp_path, collective):
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    launch = [sys.executable, "-m", "ferro", "run", "-n", "2"]
    ended = subprocess.run(
        [*launch, str(script), str(BENCHMARKS), collective],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert ended.returncode != 0
    assert "careless: wrong result" in ended.stdout + ended.stderr
