"""This host's own addresses, at which ranks on other hosts may find it."""

from __future__ import annotations

import array
import ipaddress
import socket
import struct
import sys

_SIOCGIFCONF = 0x8912  # Linux: the IPv4 addresses of all interfaces
_ENTRY_BYTES = 40
_MOST_ENTRIES = 256
# Addresses set aside for documentation: a route to them is the default one, and nobody answers.
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


def own_addresses() -> list[str]:
    """Return the addresses of this host, those of the default routes first.

    The host's name is not asked: it often stands for a loopback address. Loopback addresses are
    returned only when there are no others.
    """
    found = [*_on_default_routes(), *_on_interfaces()]
    return [a for a in dict.fromkeys(found) if not ipaddress.ip_address(a).is_loopback] or ["127.0.0.1"]


def _on_default_routes() -> list[str]:
    """Return the addresses from which this host would speak to the world; sends nothing."""
    found = []
    for family, far in _ELSEWHERE:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect((far, 9))
                found.append(str(sock.getsockname()[0]))
        except OSError:
            continue  # no such route
    return found


def _on_interfaces() -> list[str]:
    """Return the IPv4 addresses of all interfaces that are up, on Linux."""
    if sys.platform != "linux":
        return []
    import fcntl  # only where there is one

    entries = array.array("B", bytes(_ENTRY_BYTES * _MOST_ENTRIES))
    where, length = entries.buffer_info()
    request = struct.pack("iL", length, where)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            filled, _ = struct.unpack("iL", fcntl.ioctl(sock, _SIOCGIFCONF, request))
    except OSError:
        return []
    # Each entry: 16 bytes of name, then a sockaddr_in, whose address is its bytes 4 to 8.
    return [socket.inet_ntoa(entries[start + 20 : start + 24].tobytes()) for start in range(0, filled, _ENTRY_BYTES)]
