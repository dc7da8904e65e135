"""gloo passes the kit that every backend has to pass, between real processes."""

import pytest

from ferro.testing import conformance
from ferro.testing.case import Case

CASE = Case(backend="gloo", world_sizes=(1, 2, 3))


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_gloo_conforms(check):
    check(CASE)
