"""Helpers for sockets: deadlines, options, forked children, and the addresses of this host."""

from __future__ import annotations

import array
import errno
import ipaddress
import os
import socket
import struct
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

_LONGEST_TIMEOUT_S = 7 * 24 * 3600.0

_SIOCGIFCONF = 0x8912  # the ioctl that lists the IPv4 addresses of all interfaces, on Linux
_ENTRY_BYTES = 40
_MOST_ENTRIES = 256
# Addresses reserved for documentation: only the default route leads to them, and nothing is sent there.
_REMOTE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


def remaining_s(deadline: float) -> float:
    """Compute the seconds until `deadline` (`time.monotonic()`), from 0 to a week: a timeout cannot hold more."""
    return min(max(deadline - time.monotonic(), 0.0), _LONGEST_TIMEOUT_S)


def set_deadline(sock: socket.socket, deadline: float) -> None:
    """Bound the next blocking call on `sock`, or raise TimeoutError when the deadline has passed."""
    timeout_s = remaining_s(deadline)
    if not timeout_s:  # as a timeout, 0 would make the socket non-blocking
        raise TimeoutError("the deadline has passed")
    sock.settimeout(timeout_s)


def set_options(sock: socket.socket) -> None:
    """Send small messages at once (TCP_NODELAY), and notice in the end when the other host vanished."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def close_in_children(sock: socket.socket) -> socket.socket:
    """Have every forked child close its copy of a socket, and return the socket.

    The other end would not notice the death of this process as long as a child held a copy, and a port would stay
    taken. Closing a copy neither ends the connection nor changes what this process's selectors watch.
    """
    _not_inherited.add(sock)
    return sock


def _close_copies() -> None:
    for sock in _not_inherited:
        sock.close()


_not_inherited: weakref.WeakSet[socket.socket] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies)


def bound_socket(host: str, port: int) -> socket.socket:
    """Open a TCP socket bound to an address or a name of this host; "" is all its addresses, IPv4 and IPv6."""
    found: list[tuple[int, tuple[object, ...]]] = [(socket.AF_INET6, ("::", port)), (socket.AF_INET, ("", port))]
    if host:
        flags = socket.AI_PASSIVE
        found = [(i[0], i[4]) for i in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)]
    for left, (family, sockaddr) in enumerate(found, 1 - len(found)):
        try:
            with ExitStack() as stack:
                sock = close_in_children(stack.enter_context(socket.socket(family, socket.SOCK_STREAM)))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bool(host))
                sock.bind(sockaddr)
                stack.pop_all()
                return sock
        except OSError as error:
            if not left or error.errno == errno.EADDRINUSE:  # otherwise this system may lack IPv6
                raise
    raise OSError(f"{host} has no address")


def numeric_host(sockaddr: Sequence[Any]) -> str:
    """Write the address of a socket's end; a link-local one with the name of the interface that leads to it."""
    host = str(sockaddr[0]).removeprefix("::ffff:")
    return f"{host}%{socket.if_indextoname(sockaddr[3])}" if sockaddr[3:] and sockaddr[3] else host


def is_loopback(host: str) -> bool:
    """Say whether a name or an address means this host alone, without resolving names."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def own_address(host: str) -> str:
    """Choose this host's address to be told to others: the one that `host` means here if that is one, or the first.

    Its own name may mean loopback here, another machine that forwards connections, or nothing yet.
    """
    found: list[str] = []
    with suppress(OSError):
        found = [own for own in _bindable(host) if not is_loopback(own)]
    return (found or own_addresses())[0]


def is_elsewhere(host: str) -> bool:
    """Say whether no address that a name means is this host's, as where another machine forwards connections."""
    try:
        return not any(_bindable(host))
    except OSError:  # the name may be known later
        return False


def _bindable(host: str) -> list[str]:
    """List the addresses of a name that belong to this host; OSError says that the name is not known."""
    found = []
    for family, _, _, _, sockaddr in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind(sockaddr)
            found.append(numeric_host(sockaddr))
    return found


def own_addresses() -> list[str]:
    """List the addresses at which other hosts may find this one, those of the default routes first.

    The host's name is not resolved: it often stands for a loopback address. Loopback addresses are listed only when
    there are no others.
    """
    found = []
    for family, remote in _REMOTE:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:  # there may be no such route
            sock.connect((remote, 9))  # a datagram socket sends nothing to connect
            found.append(str(sock.getsockname()[0]))
    found += _on_interfaces()
    with suppress(OSError), open("/proc/net/if_inet6") as file:  # on Linux; each line begins with 32 digits
        lines = [line.split() for line in file]
        found += [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line[0])) for line in lines if line[3] == "00"]
    return [a for a in dict.fromkeys(found) if not ipaddress.ip_address(a).is_loopback] or ["127.0.0.1"]


def _on_interfaces() -> list[str]:
    """List the IPv4 addresses of all interfaces that are up, on Linux."""
    if sys.platform != "linux":
        return []
    import fcntl  # other systems have none

    entries = array.array("B", bytes(_ENTRY_BYTES * _MOST_ENTRIES))
    where, length = entries.buffer_info()
    request = struct.pack("iL", length, where)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            filled, _ = struct.unpack("iL", fcntl.ioctl(sock, _SIOCGIFCONF, request))
    except OSError:
        return []
    # An entry is 16 bytes of name, then a sockaddr_in, whose address is its bytes 4 to 8.
    return [socket.inet_ntoa(entries[start + 20 : start + 24].tobytes()) for start in range(0, filled, _ENTRY_BYTES)]
