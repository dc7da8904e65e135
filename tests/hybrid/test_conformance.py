"""The hybrid backend passes the conformance kit, made of two gloo backends and as `ferro.init` makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from ferro.collectives import Choice
from ferro_testing import conformance
from ferro_testing.case import Case, attempt
from ferro_testing.outcome import Outcome

from ..gloo.conftest import Ranks
from ..world_sizes import sizes_for
from .ranks import connect_two

# gloo's own tests cover the other dtypes; these tests are about which part carries out an operation.
DTYPES = ("bool", "int8", "bfloat16", "float32", "complex64")


def in_threads(
    function: Callable[..., object], world_size: int, args: Sequence[object], *, timeout_s: float, deterministic: bool
) -> list[Outcome]:
    """Run the ranks of a case as threads whose parts are two gloos."""
    outcomes: dict[int, Outcome] = {}

    def connect(config):
        return connect_two(replace(config, choice=Choice(deterministic=deterministic)))

    def on_rank(group):
        outcomes[group.rank], error = attempt(function, group, args)
        if error is not None:
            raise error

    ranks = Ranks(world_size, timeout_s=timeout_s, connect=connect)
    ranks.start(on_rank)
    ranks.join()
    for rank, error in ranks.errors.items():
        outcomes.setdefault(rank, Outcome(rank=rank, error_text=repr(error)))
    return [outcomes[rank] for rank in range(world_size)]


TWO_GLOOS = Case(backend="hybrid", dtypes=DTYPES, timeout_s=20, runner=in_threads)
PROCESSES = Case(backend="cpu:gloo", world_sizes=(3,), dtypes=("float32",))


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_two_gloos_conform(check):
    check(replace(TWO_GLOOS, world_sizes=sizes_for(check)))


@pytest.mark.parametrize(
    "check",
    [conformance.check_movements, conformance.check_groups, conformance.check_lost_peer],
    ids=lambda check: check.__name__,
)
def test_a_map_conforms_between_processes(check):
    check(PROCESSES)
