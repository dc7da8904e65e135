"""The client's end of a connection: resolve the address, retry until something listens, authenticate both ways."""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack

from ferro.errors import AuthenticationError, RendezvousError
from ferro.rendezvous.auth import handshake
from ferro.rendezvous.sockets import remaining_s, set_deadline, set_options
from ferro.runtime.environment import format_address

_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.5
# The bound of one attempt. An address that drops packets, or a service that never answers, must not use up the time for
# the other addresses of the host.
_ATTEMPT_S = 10.0
# A listener that refuses a client says so. A listener that is overloaded or closing may drop the connection after the
# client's proof without a word, so only repeated drops count as a refusal.
_DROPS_THAT_REFUSE = 3


def connect(
    address: tuple[str, int], secret: bytes, *, purpose: bytes, deadline: float, started: bool = False
) -> socket.socket:
    """Connect to a ferro service, such as b"store", before `deadline` (`time.monotonic()`); authenticate both ends.

    A refused connection, an unknown host and a dropped connection are retried, with growing pauses: the service may
    start later than we do; when it is known to have `started`, ConnectionRefusedError is raised at once, since the
    service must have ended. AuthenticationError is raised at once when one end does not hold the other's secret,
    RendezvousError at once when the service is not ferro, and when nothing answered in time. The socket returned is
    blocking, without timeout, with TCP_NODELAY, and no byte has been read from it beyond the handshake.
    """
    handshake.require_secret(secret)
    attempts = _Attempts(address, secret, purpose, started)
    pause_s = _FIRST_PAUSE_S
    while (sock := attempts.try_all(deadline)) is None:
        if remaining_s(deadline) <= pause_s:
            raise attempts.unreachable()
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    return sock


class _Attempts:
    """The attempts of one call of `connect`: the addresses tried, and why the last one failed."""

    def __init__(self, address: tuple[str, int], secret: bytes, purpose: bytes, started: bool) -> None:
        self._started = started
        self._address = address
        self._secret = secret
        self._purpose = purpose
        self._service = purpose.decode(errors="replace")
        self._what = f"the {self._service} at {format_address(address)}"
        self._since = time.monotonic()
        self._tried: dict[str, None] = {}
        self._reason = "the deadline had already passed"
        self._drops = 0

    def try_all(self, deadline: float) -> socket.socket | None:
        """Try every address of the host once."""
        try:
            found = socket.getaddrinfo(*self._address, type=socket.SOCK_STREAM)
        except OSError as exc:
            self._reason = f"the host name could not be resolved ({exc})"
            return None
        for family, _, _, _, sockaddr in found:
            self._tried[format_address((str(sockaddr[0]), self._address[1]))] = None
            if sock := self._try_one(family, sockaddr, min(deadline, time.monotonic() + _ATTEMPT_S)):
                return sock
        return None

    def _try_one(self, family: int, sockaddr: tuple[object, ...], deadline: float) -> socket.socket | None:
        state = handshake.Handshake(handshake.client(self._secret, self._purpose))
        try:
            with ExitStack() as stack:
                sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                set_deadline(sock, deadline)
                sock.connect(sockaddr)
                if sock.getsockname() == sock.getpeername():
                    # TCP lets a port of the ephemeral range connect to itself.
                    raise ConnectionRefusedError("nothing listens there")
                set_options(sock)
                _authenticate(sock, state, deadline)
                sock.settimeout(None)
                stack.pop_all()
                return sock
        except handshake.WrongSecretError as exc:
            raise self._refused(str(exc)) from exc
        except handshake.StrangerError as exc:
            raise RendezvousError(
                f"{self._what} was not found: {exc}. Check that the port belongs to this job's {self._service}, and "
                "that nothing else took it."
            ) from exc
        except OSError as exc:
            if self._started and isinstance(exc, ConnectionRefusedError):
                raise
            self._reason = str(exc) or type(exc).__name__
            self._drops += state.replies > 0 and isinstance(exc, ConnectionError)
            if self._drops == _DROPS_THAT_REFUSE:
                raise self._refused("it closes the connection after our proof") from exc
            return None

    def unreachable(self) -> RendezvousError:
        return RendezvousError(
            f"{self._what} could not be reached from {socket.gethostname()} (pid {os.getpid()}): tried "
            f"{', '.join(self._tried) or 'no address'} for {time.monotonic() - self._since:.1f} s; last reason: "
            f"{self._reason}. Check that the process that hosts it (rank 0 or `ferro run`) is alive, that host and "
            "port are right, and that no firewall is between."
        )

    def _refused(self, reason: str) -> AuthenticationError:
        return AuthenticationError(
            f"{self._what} and this process (pid {os.getpid()} on {socket.gethostname()}) do not hold the same secret: "
            f"{reason}. Check that FERRO_SECRET is the same on all ranks, and that both belong to one job and this "
            f"port to its {self._service}."
        )


def _authenticate(sock: socket.socket, state: handshake.Handshake, deadline: float) -> None:
    sock.sendall(state.opening)
    while state.wants:
        set_deadline(sock, deadline)
        try:
            data = sock.recv(state.wants)
        except TimeoutError:
            raise TimeoutError("it accepts the connection, but does not answer") from None
        if not data:
            raise ConnectionResetError("it closed the connection during the handshake")
        sock.sendall(state.feed(data))
