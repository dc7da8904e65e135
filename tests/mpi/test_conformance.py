"""mpi passes the conformance kit under the mpiexec of Open MPI and of MPICH."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from ferro_testing import conformance
from ferro_testing.case import Case

from .conftest import MPICH, OPENMPI, installed
from .rank_pool import RankPool

ENDS_ALL = "mpiexec ends all ranks when one has died"
CASES = {
    "mpich": (
        MPICH,
        Case(
            backend="mpi",
            world_sizes=(3,),
            unsupported={"lost_peer": ENDS_ALL, "shrink": "MPICH's survivors cannot go on"},
        ),
    ),
    "openmpi": (OPENMPI.with_options("--with-ft", "ulfm"), Case(backend="mpi", world_sizes=(2,))),
}
# After these a rank has died, or messages are still under way: each has ranks of its own.
FAILURES = {"check_timeout", "check_send_deadline", "check_lost_peer", "check_abort", "check_shrink"}


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, RankPool]]:
    """Ranks under each mpiexec for all checks that end well."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(RankPool(launch.command(case.largest), launch.python, case.largest))
            for name, (launch, case) in CASES.items()
        }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_mpi_conforms(check, name, pools):
    launch, case = CASES[name]
    runner = installed(launch).runner if check.__name__ in FAILURES else pools[name].runner
    check(replace(case, runner=runner))
