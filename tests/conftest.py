"""Fixtures that tests of several rooms use."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from ferro_testing.forked_ranks import PRELOADED

from .namespaces import CannotMakeHosts, Hosts

# A busy machine is slow, which is no fault of a test.
settings.register_profile("ferro", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ferro")

PRELOADED.extend(["pytest", "ferro_gloo.backend", "ferro_strategies"])


def pytest_collection_finish() -> None:
    """Hide all that exists from the garbage collector.

    Hundreds of tests collect garbage, and each time the collector would walk through the thousands of tests as well.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts, each a network namespace; the test is skipped where there can be none."""
    try:
        with Hosts.made() as made:
            yield made
    except CannotMakeHosts as error:
        pytest.skip(str(error))


@pytest.fixture
def default_sigint() -> Iterator[None]:
    """Give SIGINT its default action, also in started processes; it is ignored in a script's background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
