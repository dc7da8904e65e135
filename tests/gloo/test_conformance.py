"""gloo passes the kit that every backend has to pass, however its ranks reach each other.

Three ranks that share memory are processes. The other cases are checked by ranks that are threads,
with sockets and memory as between processes: that is quicker. Several hosts are checked in `hierarchy`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from ferro import BackendConfig
from ferro_gloo.backend import GlooBackend
from ferro_testing import conformance
from ferro_testing.case import Case

from .conftest import outcomes_in_threads

Change = Callable[[BackendConfig], BackendConfig]


def with_option(name: str) -> Change:
    return lambda config: replace(config, options={name: False})


def in_threads(change: Change, *world_sizes: int) -> Case:
    """Return a case whose ranks are threads that connect with a changed configuration."""

    runner = partial(outcomes_in_threads, lambda config: GlooBackend.connect(change(config)))
    return Case(backend="gloo", world_sizes=world_sizes, timeout_s=20, runner=runner)


CASES = {
    "shared memory": Case(backend="gloo", world_sizes=(3,)),
    "shared memory, few ranks": in_threads(lambda config: config, 1, 2),
    "shared memory in pure Python": in_threads(with_option("native_helper"), 3),
    "TCP": in_threads(with_option("shared_memory"), 2, 3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_gloo_conforms(check, case):
    check(case)
