"""nccl passes the conformance kit, except for the calls that NCCL does not have.

The kit's arrays are NumPy's, which go through the GPU; `test_collectives.py` uses GPU arrays.
`check_transfers` is left out: it lets ranks send to each other before they receive, which is a
deadlock on NCCL's one queue (`test_transfers.py` tests the orders that work). Means are compared
where 1/n is exact, for NCCL divides each rank's numbers before it adds them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from ferro_nccl import operation_queue
from ferro_testing import conformance
from ferro_testing.case import Case, attempt
from ferro_testing.outcome import Outcome

from ..world_sizes import sizes_for
from .conftest import Ranks
from .standin import Machine

DIFFERENCES = {
    "half_rounded_once": "NCCL rounds each addition",
    "tags": "NCCL has none",
    "mismatch": "comparing calls would make the host wait for the GPU in each; it is an option",
    "shrink": "CuPy has no ncclCommShrink",
}
_WITHOUT = (conformance.check_transfers, conformance.check_exchange)
CHECKS = [check for check in conformance.CHECKS if check not in _WITHOUT]
_WITH_MEANS = (conformance.check_reductions, conformance.check_repeated_calls, conformance.check_persistent)


def case(monkeypatch, *world_sizes, **options):
    """Make a case whose ranks are threads with a GPU each."""

    def run(function, world_size, args, *, timeout_s, deterministic):
        machine = Machine(gpus=world_size)
        machine.install(monkeypatch)
        outcomes = {}

        def on_rank(group):
            outcomes[group.rank], error = attempt(function, group, args)
            if error is not None:
                raise error

        ranks = Ranks(machine, world_size, timeout_s=timeout_s, deterministic=deterministic, options=options)
        ranks.start(on_rank)
        ranks.join()
        machine.close()
        assert machine.faults == []
        for rank, error in ranks.errors.items():
            outcomes.setdefault(rank, Outcome(rank=rank, error_type="x", error_text=repr(error)))
        return [outcomes[rank] for rank in range(world_size)]

    return Case(backend="nccl", world_sizes=world_sizes, unsupported=DIFFERENCES, timeout_s=20, runner=run)


@pytest.fixture(autouse=True)
def few_spins(monkeypatch):
    """Let ranks that wait sleep soon: they are threads here, and keep the interpreter from the rank they wait for."""
    monkeypatch.setattr(operation_queue, "_SPINS", 3)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_nccl_conforms(check, monkeypatch):
    check(case(monkeypatch, *sizes_for(check, largest=4 if check in _WITH_MEANS else 3)))


def test_ranks_that_make_different_calls_are_told_where_calls_are_compared(monkeypatch):
    reason = "what a receive does not fit is never found: transfers have no labels"
    comparing = case(monkeypatch, 3, check_calls=True)
    conformance.check_mismatch(replace(comparing, unsupported={"send": reason}))
