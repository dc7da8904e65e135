"""The example's transfers by themselves: full pipes, aborts and lost peers."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ferro import BackendConfig, GroupClosed, PeerLost
from ferro.rendezvous.store.memory import MemoryStore

SOURCES = Path(__file__).parents[2] / "examples" / "ferro-pipes" / "src"


@pytest.fixture
def pair(monkeypatch):
    """Two connected ranks."""
    monkeypatch.syspath_prepend(SOURCES)
    from ferro_pipes.backend import PipesBackend

    store = MemoryStore()
    configs = [BackendConfig(rank=r, world_size=2, store=store, timeout_s=10) for r in range(2)]
    with ThreadPoolExecutor() as pool:
        backends = list(pool.map(PipesBackend, configs))
        yield backends
        for backend in backends:
            backend.close()
    readers = [t for t in threading.enumerate() if "_read" in t.name]
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()
    sys.modules.pop("ferro_pipes.backend", None)
    sys.modules.pop("ferro_pipes", None)


def soon(seconds=10.0):
    return time.monotonic() + seconds


def flood(backend, deadline):
    """Send until the pipe is full, and what the other rank keeps."""
    message = np.zeros(1000, np.uint8)
    while True:
        backend.send(message, 1, tag=1, deadline=deadline)


def test_a_send_into_a_full_pipe_ends_by_its_deadline(pair):
    with pytest.raises(TimeoutError):
        flood(pair[0], soon(0.5))


def test_abort_wakes_a_blocked_send_and_a_blocked_receive(pair):
    with ThreadPoolExecutor() as pool:
        sending = pool.submit(flood, pair[0], soon())
        receiving = pool.submit(pair[0].recv, np.empty(1), 1, tag=1, deadline=soon())
        with pytest.raises(TimeoutError):  # by then the other two wait, or come too late to
            pair[0].recv(np.empty(1), 1, tag=2, deadline=soon(0.3))
        pair[0].abort()
        with pytest.raises(GroupClosed):
            receiving.result(5)
        with pytest.raises(GroupClosed):
            sending.result(5)


def test_creating_that_fails_closes_what_it_opened(monkeypatch):
    monkeypatch.syspath_prepend(SOURCES)
    from ferro_pipes import backend

    opened = []
    real = backend.socket
    monkeypatch.setattr(backend, "socket", lambda family: opened.append(real(family)) or opened[-1])
    config = BackendConfig(rank=0, world_size=3, store=MemoryStore(), timeout_s=0.1)
    with pytest.raises(TimeoutError):
        backend.PipesBackend(config)
    assert [pipe.fileno() for pipe in opened] == [-1, -1]


def test_what_was_sent_before_the_end_still_arrives(pair):
    sent = np.arange(10_000.0)
    pair[0].send(sent, 1, tag=3, deadline=soon())
    pair[0].send(sent[:0], 1, tag=4, deadline=soon())
    pair[0].close()
    received = np.empty_like(sent)
    pair[1].recv(received[:0], 0, tag=4, deadline=soon())
    pair[1].recv(received, 0, tag=3, deadline=soon())
    np.testing.assert_array_equal(received, sent)
    with pytest.raises(PeerLost, match="closed its pipe"):
        pair[1].recv(received, 0, tag=3, deadline=soon())
