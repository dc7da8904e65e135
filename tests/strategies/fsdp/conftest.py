"""Tests of FSDP's order and memory run both ways: operations beside the computation, and in its thread.

Gathers into memory that is kept are persistent there, as those of large units are.
"""

import pytest

from ferro_strategies.fsdp import flat_parameter, unit_scheduler

from .ways import WAYS


@pytest.fixture(params=WAYS)
def both_ways(request, monkeypatch):
    """Run a test with operations in the group's thread, and again in the caller's."""
    monkeypatch.setattr(flat_parameter, "PERSISTENT_BYTES", 0)
    monkeypatch.setattr(unit_scheduler, "_runs_at_once", lambda units, config: request.param == "at once")
