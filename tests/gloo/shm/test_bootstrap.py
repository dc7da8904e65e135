"""The errors of ferro.init when a rank fails while ranks find those that share memory."""

from __future__ import annotations

import itertools
import threading

import pytest

import ferro
from ferro_gloo.backend import GlooBackend
from ferro_gloo.shm import bootstrap
from ferro_gloo.tcp.backend import TcpBackend


def test_a_rank_that_leaves_then_is_named(start_ranks):
    def connect(config):
        if config.rank != 1:
            return GlooBackend.connect(config)
        TcpBackend.connect(config).close()
        raise RuntimeError("this rank gives up")

    ranks = start_ranks(3, connect=connect)
    ranks.start(lambda group: None)
    ranks.join()
    for rank in (0, 2):
        error = ranks.errors[rank]
        assert isinstance(error, ferro.RendezvousError)
        assert error.peer == 1
        assert "Read the log of rank 1 first" in str(error)


def test_a_rank_that_stands_still_then_does_not_hang_the_others(start_ranks):
    told = threading.Event()

    def connect(config):
        if config.rank != 1:
            return GlooBackend.connect(config)
        flat = TcpBackend.connect(config)
        told.wait(20)
        flat.close()
        raise RuntimeError("this rank was asleep")

    ranks = start_ranks(2, connect=connect, timeout_s=1.0)
    ranks.start(lambda group: None, range(1))
    ranks.start(lambda group: None, range(1, 2))
    ranks.threads[0].join(20)
    told.set()
    ranks.join()
    assert isinstance(ranks.errors[0], ferro.RendezvousError)
    assert "could not find out who shares its memory within 1 s" in str(ranks.errors[0])


@pytest.mark.parametrize("one_core", [False, True])
def test_ranks_spin_where_they_have_a_core_each(start_ranks, monkeypatch, one_core):
    """The ranks are threads here, so that the cores of each can be chosen."""
    next_core = itertools.count()
    monkeypatch.setattr(bootstrap, "_own_cores", lambda: [0 if one_core else next(next_core)])
    monkeypatch.setattr(bootstrap, "usable_cores_together", len)
    ranks = start_ranks(2)
    ranks.start(lambda group: group._backend._host.spin)
    assert ranks.join() == dict.fromkeys(range(2), not one_core), ranks.errors
