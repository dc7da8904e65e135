"""The addresses on which a host listens, and those that it tells others."""

from __future__ import annotations

import errno
import socket

import pytest

from ferro.rendezvous import listen, sockets

HOSTS = ("127.0.0.1", "::1")


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError:
        return False
    return True


def has(host: str) -> bool:
    return bool(sockets._bindable(host))


def test_all_addresses_are_those_of_both_families_on_one_port():
    with listen("") as sock:
        port = sock.getsockname()[1]
        assert [answers(host, port) for host in HOSTS] == [has(host) for host in HOSTS]
        with pytest.raises(OSError, match="in use"):
            sockets.bound_socket("", port)


def test_one_address_is_that_one_alone():
    with listen("127.0.0.1") as sock:
        assert [answers(host, sock.getsockname()[1]) for host in HOSTS] == [True, False]


def test_without_ipv6_all_addresses_are_those_of_ipv4(monkeypatch):
    class WithoutIpv6(socket.socket):
        def __init__(self, family: int, kind: int) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, kind)

    monkeypatch.setattr(socket, "socket", WithoutIpv6)
    with listen("") as sock:
        assert sock.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize(
    ("means", "elsewhere"),
    [("127.0.1.1", False), ("192.0.2.1", True), (None, False)],
    ids=["loopback", "another machine", "nothing yet"],
)
def test_a_name_that_does_not_mean_an_address_of_this_host_is_replaced_by_one(monkeypatch, means, elsewhere):
    def resolve(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        if means is None:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (means, port))]

    monkeypatch.setattr(sockets, "own_addresses", lambda: ["10.1.2.3"])
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert sockets.own_address("node-a") == "10.1.2.3"
    assert sockets.is_elsewhere("node-a") is elsewhere


def test_addresses_are_written_as_others_can_use_them():
    name, index = next((name, index) for index, name in socket.if_nameindex())
    assert sockets.numeric_host(("10.1.2.3", 1)) == "10.1.2.3"
    assert sockets.numeric_host(("::ffff:10.1.2.3", 1, 0, 0)) == "10.1.2.3"
    assert sockets.numeric_host(("fe80::1", 1, 0, index)) == f"fe80::1%{name}"
    assert [sockets.is_loopback(h) for h in ("localhost", "127.0.1.1", "::1", "n01", "fe80::1%eth0")] == [
        *(True, True, True, False, False)
    ]
