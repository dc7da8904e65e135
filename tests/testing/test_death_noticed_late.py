"""A backend that notices a dead rank by nothing but the deadline has a gap, and is not wrong."""

from __future__ import annotations

import threading
import time

import pytest

from ferro.errors import PeerLost
from ferro_testing import killing
from ferro_testing.case import Case, run_simulated
from ferro_testing.command.verdicts import judge
from ferro_testing.failures import check_lost_peer
from ferro_testing.killing import DeathNoticedLate
from ferro_testing.shrinking import check_shrink

LATE = "a dead rank is told only by the deadline"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(killing, "_PATIENCE_S", 0.5)


def case(spoil, ranks=3, **options):
    """Return a case whose ranks' backends are spoilt by `spoil(backend)`."""

    def runner(function, world_size, args, *, timeout_s, deterministic):
        def on_rank(group, *args):
            spoil(group.backend)
            return function(group, *args)

        return run_simulated(on_rank, world_size, args, timeout_s=timeout_s, deterministic=deterministic)

    return Case(backend="spoilt", world_sizes=(ranks,), timeout_s=10, runner=runner, **options)


def sit_out(backend):
    """Let the deadline pass when a rank is lost."""
    right = backend.agree

    def agree(call, *, deadline):
        try:
            right(call, deadline=deadline)
        except PeerLost:
            threading.Event().wait(max(0.0, deadline - time.monotonic()))
            raise TimeoutError("the deadline passed") from None

    backend.agree = agree


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("check", [check_lost_peer, check_shrink])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_kit_says_what_to_declare(check, ranks):
    with pytest.raises(DeathNoticedLate, match=r'nobody noticed that rank 1 died.*declare "lost_peer"'):
        check(case(sit_out, ranks))
    check(case(sit_out, ranks, unsupported={"lost_peer": "told late"}))


@pytest.mark.usefixtures("impatient")
def test_the_command_shows_a_gap(monkeypatch):
    monkeypatch.setattr(
        "ferro_testing.command.verdicts.FEATURES", {"lost_peer": check_lost_peer, "shrink": check_shrink}
    )
    found = judge(case(sit_out), launched=False, quick=True, told=lambda verdict: None)
    assert {verdict.name: (verdict.status, verdict.text) for verdict in found.values()} == {
        "check_lost_peer": ("refused", LATE),
        "check_shrink": ("refused", LATE),
    }


def blame_another(backend):
    """Raise what names the wrong rank."""
    right = backend.agree

    def agree(call, *, deadline):
        try:
            right(call, deadline=deadline)
        except PeerLost as error:
            raise PeerLost("no", peer=(error.peer + 1) % 3) from None

    backend.agree = agree


def test_to_name_another_rank_is_wrong():
    with pytest.raises(AssertionError) as caught:
        check_lost_peer(case(blame_another))
    assert not isinstance(caught.value, DeathNoticedLate)
