"""MPI is started by ferro or taken as the program started it, and refused with reasons."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

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
    ended = mpi.program(1, write(tmp_path, STARTED_BEFORE.format(level="SERIALIZED")))
    assert ended.returncode != 0
    assert "MPI_THREAD_SERIALIZED, and ferro needs MPI_THREAD_MULTIPLE" in ended.stderr


def test_the_wrong_mpiexec_is_refused_with_both_numbers(mpi, tmp_path):
    """`ferro run` starts worlds of one for MPI, as another MPI's mpiexec does."""
    path = write(tmp_path, "import ferro\nferro.init('mpi')\n")
    ended = subprocess.run(
        (mpi.python, "-m", "ferro", "run", "-n", "2", path), capture_output=True, text=True, timeout=60
    )
    assert ended.returncode != 0
    assert "MPI's world has 1 process, but 2 ranks were launched, with " in ended.stderr


def test_an_example_runs_over_mpi(mpich):
    ended = mpich.program(2, DIGITS, "--epochs", "1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"world of 2 over mpi: held-out accuracy [\d.]+%", ended.stdout)


BROADCASTS = """
import time
import ferro
from ferro import backends
from mpi4py import MPI
received = backends.get("mpi").bootstrap_broadcast(
    MPI.COMM_WORLD.rank, 2, b"rank 0's" if MPI.COMM_WORLD.rank == 0 else None, time.monotonic() + 20
)
assert received == b"rank 0's"
group = ferro.init()
print(f"{group.backend_name}{group.all_reduce(1)}")
"""


def test_mpi_broadcasts_before_any_group_is_what_init_takes_and_ends_well(mpi, tmp_path):
    ended = mpi.program(2, write(tmp_path, BROADCASTS))
    assert (ended.returncode, ended.stderr) == (0, "")
    # mpiexec may run the lines of two ranks together.
    assert "".join(ended.stdout.split()) == "mpi2mpi2"
