"""Tests of FSDP's order and memory run both ways: operations beside the computation, and in its thread."""

import pytest

from ferro_strategies.fsdp import unit_scheduler


@pytest.fixture(params=["beside", "at once"])
def both_ways(request, monkeypatch):
    """Run a test with operations in the group's thread, and again in the caller's."""
    monkeypatch.setattr(unit_scheduler, "_runs_at_once", lambda units, config: request.param == "at once")
