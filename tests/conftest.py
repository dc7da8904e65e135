"""What tests of several rooms need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .namespaces import CannotMakeHosts, Hosts


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts, each a network namespace; the test is skipped where there can be none."""
    try:
        with Hosts.made() as made:
            yield made
    except CannotMakeHosts as error:
        pytest.skip(str(error))
