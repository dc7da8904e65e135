"""mpi passes the conformance kit under the mpiexec of Open MPI and of MPICH."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ferro_testing import conformance
from ferro_testing.case import Case

from .conftest import MPICH, OPENMPI, installed

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
# After these a rank has died: each has ranks of its own.
DEATHS = {"check_lost_peer", "check_shrink"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_mpi_conforms(check, name, pools):
    launch, case = CASES[name]
    runner = installed(launch).runner if check.__name__ in DEATHS else pools(launch, case.largest).runner
    check(replace(case, runner=runner))
