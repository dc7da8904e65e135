"""The pipes backend passes the conformance checks of every backend."""

import pytest

from ferro_testing.conformance import CHECKS, Case

CASE = Case(
    backend="pipes", world_sizes=(1, 3), unsupported={"shrink": "pipes that a failure has closed are not opened again"}
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_pipes_conforms(check):
    check(CASE)
