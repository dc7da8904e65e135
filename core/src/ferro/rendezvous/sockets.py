"""Helpers for sockets: deadlines, options, forked children, and the addresses of this host."""

from __future__ import annotations

import array
import ipaddress
import os
import socket
import struct
import sys
import time
import weakref
from contextlib import suppress

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
