"""The Poisson example: right on one, two and three ranks, beside mpi4py where it is, and it tells wrong options."""

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "poisson.py"
MPIEXEC = Path(sys.executable).with_name("mpiexec")
DEADLINE_S = 120


def run(command):
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def solved(output):
    """Return what each library has found: iterations and error."""
    found = re.findall(r"(\w+): 40 x 40 unknowns on \d ranks: (\d+) iterations of [\d.]+ us, error (\S+)", output)
    return {name: (int(iterations), float(error)) for name, iterations, error in found}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_finds_the_exact_solution(ranks, tmp_path):
    picture = tmp_path / "poisson.png"
    launcher = [] if ranks == 1 else ["-m", "ferro", "run", "-n", str(ranks)]
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    output = run([sys.executable, *launcher, str(EXAMPLE), "--n=40", "--rounds=2", *plot])
    iterations, error = solved(output)["ferro"]
    assert 40 < iterations < 120
    assert error < 1e-10
    if importlib.util.find_spec("scipy"):
        difference = re.search(r"difference from SciPy's solution: (\S+)", output)
        assert float(difference[1]) < 1e-10
    assert picture.exists() == bool(plot)


@pytest.mark.skipif(not MPIEXEC.exists() and not shutil.which("mpiexec"), reason="there is no mpiexec here")
def test_runs_the_same_over_mpi4py():
    launcher = str(MPIEXEC) if MPIEXEC.exists() else "mpiexec"
    output = run([launcher, "-n", "2", sys.executable, str(EXAMPLE), "--n=40", "--rounds=2", "--compare"])
    found = solved(output)
    assert found["ferro"][0] == found["mpi4py"][0]
    assert max(error for _, error in found.values()) < 1e-10


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ("--n=2", "--n must be at least the number of ranks, 3: each has a row"),
        ("--rounds=0", "--rounds must be at least 1, and --tolerance between 0 and 1"),
        ("--tolerance=0", "--rounds must be at least 1, and --tolerance between 0 and 1"),
        ("--n=3", None),
    ],
)
def test_options_that_make_no_sense_are_told(options, fault):
    example = runpy.run_path(str(EXAMPLE))
    assert example["fault_of"](example["parse"](options.split()), 3) == fault
