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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_mpi_conforms(check, name):
    launch, case = CASES[name]
    check(replace(case, runner=installed(launch).runner))
