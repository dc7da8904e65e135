"""Socket addresses as people read them, deadlines as sockets take them, and socket options."""

from __future__ import annotations

import socket
import time

_LONGEST_WAIT_S = 7 * 24 * 3600.0


def show_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def remaining_s(deadline: float) -> float:
    """Seconds until `deadline` (`time.monotonic()`), from 0 to a week: what a timeout can hold."""
    return min(max(deadline - time.monotonic(), 0.0), _LONGEST_WAIT_S)


def set_deadline(sock: socket.socket, deadline: float) -> None:
    """Bound the next blocking call on `sock`.

    Raises:
        TimeoutError: the deadline has passed (0 would mean "do not block" to a socket).
    """
    left = remaining_s(deadline)
    if not left:
        raise TimeoutError("the deadline has passed")
    sock.settimeout(left)


def tune(sock: socket.socket) -> None:
    """Small messages leave at once, and a host that vanished is noticed in the end."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
