"""The contestants: libraries to start, each with its command line, and the memories that they use."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ferro import backends
from ferro_bench.peers import PEERS, Installed

Memory = Literal["private", "group"]

# Peers' interpreters import the rank's package as a top-level one, since they have no ferro.
_START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import rank; del sys.path[0]; "
    "from rank.__main__ import main; main()"
)
_PACKAGE_FOLDER = str(Path(__file__).parent)
_ONE_THREAD = ("OMP_NUM_THREADS=1", "OPENBLAS_NUM_THREADS=1", "MKL_NUM_THREADS=1")
_LOOPBACK = "GLOO_SOCKET_IFNAME=" + ("lo" if sys.platform == "linux" else "lo0")


@dataclass(frozen=True, slots=True)
class Contestant:
    """One column of the results: a library with its arrays in one kind of memory.

    Attributes:
        world: the world's name.
        memory: "private" for NumPy's memory, "group" for the library's own.
        algorithm: the algorithm that ferro's world was told to use, "" where it chooses.
        persistent: each call is an operation that was made once, by `group.persistent` or MPI's `MPI_*_init`.
    """

    world: str
    memory: Memory = "private"
    algorithm: str = ""
    persistent: bool = False

    @property
    def name(self) -> str:
        """The name in the results: the library; ferro's memory and algorithm; whether its calls are persistent."""
        words = ["ferro", self.memory] if self.algorithm or self.world == "ferro" else [self.world]
        words += [self.algorithm] if self.algorithm else []
        return "-".join([*words, "persistent"] if self.persistent else words)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldPlan:
    """How to start the ranks of one library.

    Attributes:
        name: "ferro" or the peer's name.
        world_size: number of ranks.
        backend: ferro's backend, "" for the launcher's choice and for peers.
        peer: the installed peer, None for ferro itself.
        algorithms: for ferro, which algorithm serves which collective; (collective, algorithm) pairs.
    """

    name: str
    world_size: int
    backend: str = ""
    peer: Installed | None = None
    algorithms: tuple[tuple[str, str], ...] = ()

    def commands(self, task: Path) -> list[list[str]]:
        """Return the command line of every process that the driver is to start."""
        n = str(self.world_size)
        settings = ["env", *_ONE_THREAD, _LOOPBACK]
        if self.peer is None:
            fixed = [f"{collective}={algorithm}" for collective, algorithm in self.algorithms]
            return [[*settings, *self._launch(), "-m", "ferro_bench.rank", str(task), "ferro", *fixed]]
        rank = [self.peer.python, "-c", _START, _PACKAGE_FOLDER, str(task)]
        if self.peer.mpiexec is None:
            return [[*settings, *rank, "torch", str(r)] for r in range(self.world_size)]
        about = PEERS[self.peer.name]
        return [[*settings, *about.environment, self.peer.mpiexec, *about.launch, "-n", n, *rank, "mpi4py"]]

    def _launch(self) -> list[str]:
        """Write the command that starts ferro's ranks, up to their module: the backend's launcher or `ferro run`."""
        launcher = backends.get(self.backend).launcher if self.backend else None
        if launcher is None:
            return [sys.executable, "-m", "ferro", "run", "-n", str(self.world_size)]
        return [*launcher(self.world_size), sys.executable]
