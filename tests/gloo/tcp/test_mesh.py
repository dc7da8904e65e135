"""The mesh: its connections, strangers that it refuses, and its errors."""

from __future__ import annotations

import socket
import struct
import time

import numpy as np
import pytest

import ferro
from ferro.rendezvous import connect
from ferro_gloo.tcp import mesh


def total(group):
    return float(group.all_reduce(1.0))


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_every_rank_reaches_every_other(on_ranks, world_size):
    def ring(group):
        right, left = (group.rank + 1) % group.world_size, (group.rank - 1) % group.world_size
        return int(group.sendrecv(np.array(group.rank), np.array(0), right, left))

    assert on_ranks(world_size, ring) == {r: (r - 1) % world_size for r in range(world_size)}


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_over_ipv6(on_ranks):
    assert on_ranks(3, total, host="::1") == dict.fromkeys(range(3), 3.0)


STRANGERS = {
    "silence": b"",
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "zeros": bytes(4096),
    "a huge length": struct.pack("<QQ", 1 << 62, 1 << 62) * 8,
    "a frame of gloo": b"\xff" * 200,
}


@pytest.mark.parametrize("greeting", STRANGERS.values(), ids=STRANGERS)
def test_strangers_neither_get_in_nor_stop_the_job(start_ranks, greeting):
    ranks = start_ranks(3)
    ranks.start(total, range(1))
    strangers = [socket.create_connection(("127.0.0.1", ranks.port(0))) for _ in range(20)]
    try:
        for stranger in strangers:
            stranger.sendall(greeting)
        ranks.start(total, range(1, 3))
        assert ranks.join() == dict.fromkeys(range(3), 3.0)
        assert not ranks.errors
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_stranger_that_trickles_bytes_does_not_hold_up_the_others(start_ranks):
    ranks = start_ranks(2)
    ranks.start(total, range(1))
    with socket.create_connection(("127.0.0.1", ranks.port(0))) as stranger:
        stranger.sendall(b"\x00")
        ranks.start(total, range(1, 2))
        assert ranks.join() == {0: 2.0, 1: 2.0}


def test_a_rank_with_another_secret_is_refused_by_name(start_ranks):
    ranks = start_ranks(2, timeout_s=2.0)
    ranks.start(total, range(1))
    ranks.start(total, range(1, 2), secret=b"another secret of the same length")
    ranks.join()
    assert isinstance(ranks.errors[1], ferro.AuthenticationError)
    assert "cannot reach rank 0" in str(ranks.errors[1])
    assert "ranks [1] did not connect to rank 0 within 2 s" in str(ranks.errors[0])


def test_a_rank_that_never_comes_is_named(start_ranks):
    ranks = start_ranks(3, timeout_s=0.5)
    ranks.start(total, range(2))
    ranks.join()
    assert "ranks [2] did not connect to rank 0 within 0.5 s" in str(ranks.errors[0])
    assert ranks.errors[0].peer == 2


def test_a_member_that_claims_a_rank_not_expected_is_turned_away(start_ranks):
    ranks = start_ranks(2)
    ranks.start(total, range(1))
    deadline = time.monotonic() + 5
    sock = connect(("127.0.0.1", ranks.port(0)), ranks.secret, purpose=mesh._PURPOSE, deadline=deadline)
    with sock:
        sock.sendall(struct.pack("<II", 77, 0))
        sock.settimeout(5)
        assert sock.recv(1) == b"", "rank 77 of 2 was let in"
        ranks.start(total, range(1, 2))
        assert ranks.join() == {0: 2.0, 1: 2.0}
