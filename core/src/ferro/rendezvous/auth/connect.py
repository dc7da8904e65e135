"""The connecting end: find the address, retry until it listens, authenticate both ways."""

from __future__ import annotations

import os
import socket
import time

from ferro.errors import AuthenticationError, RendezvousError
from ferro.rendezvous.auth import handshake
from ferro.rendezvous.auth.addresses import remaining_s, set_deadline, show_address, tune

_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.5
# One address that swallows packets, or a service that never answers, must not use up the time in
# which another address of the same host could have been tried.
_ATTEMPT_S = 10.0
# A gate flooded by strangers may drop us between our proof and its verdict, as may one that is
# closing; a gate that refuses us says so. So silence counts as a refusal only when repeated.
_DROPS_THAT_REFUSE = 3


def connect(address: tuple[str, int], secret: bytes, *, purpose: bytes, deadline: float) -> socket.socket:
    """Connect to a ferro service and authenticate both ends.

    A refused connection, an unknown host or a dropped one is retried, with growing pauses: the
    service may start later than we do. A wrong secret and a foreign service are not.

    Args:
        address: host (name, IPv4 or IPv6) and port.
        secret: the job's; both ends must hold it.
        purpose: the service meant, such as b"store".
        deadline: absolute `time.monotonic()` second.

    Returns:
        A blocking socket without timeout, with TCP_NODELAY, on which no byte has been read
        beyond the handshake.

    Raises:
        AuthenticationError: the other end does not hold the secret, or says that we do not.
        RendezvousError: nothing answered in time, or what answered is not ferro.
    """
    handshake.require_secret(secret)
    dialer = _Dialer(address, secret, purpose)
    pause = _FIRST_PAUSE_S
    while True:
        sock = dialer.try_all(deadline)
        if sock is not None:
            return sock
        if remaining_s(deadline) <= pause:
            raise dialer.unreachable()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


class _Dialer:
    """One call of `connect`: what it tried so far, and why that failed."""

    def __init__(self, address: tuple[str, int], secret: bytes, purpose: bytes) -> None:
        self._host, self._port = address
        self._secret = secret
        self._purpose = purpose
        self._started = time.monotonic()
        self._tried: dict[str, None] = {}
        self._reason = "the deadline had already passed"
        self._drops = 0

    def try_all(self, deadline: float) -> socket.socket | None:
        """Try every address of the host once."""
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as exc:
            self._reason = f"the host name could not be resolved ({exc})"
            return None
        for family, _, _, _, sockaddr in found:
            self._tried[show_address(str(sockaddr[0]), self._port)] = None
            sock = self._try_one(family, sockaddr, deadline)
            if sock is not None:
                return sock
        return None

    def _try_one(self, family: int, sockaddr: tuple[object, ...], deadline: float) -> socket.socket | None:
        deadline = min(deadline, time.monotonic() + _ATTEMPT_S)
        conversation = handshake.client(self._secret, self._purpose)
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                set_deadline(sock, deadline)
                sock.connect(sockaddr)
                if sock.getsockname() == sock.getpeername():
                    # TCP lets a port of the ephemeral range connect to itself.
                    raise ConnectionRefusedError("nothing listens there")
                tune(sock)
                _authenticate(sock, conversation, deadline)
                sock.settimeout(None)
            except BaseException:
                sock.close()
                raise
        except handshake.WrongSecretError as exc:
            raise self._refused(str(exc)) from exc
        except handshake.StrangerError as exc:
            raise RendezvousError(
                f"{self._what()} was not found: {exc}. Check that the port belongs to this job's "
                f"{self._service()}, and that nothing else took it."
            ) from exc
        except OSError as exc:
            self._reason = str(exc) or type(exc).__name__
            if conversation.replies and isinstance(exc, ConnectionError):
                self._drops += 1
            if self._drops == _DROPS_THAT_REFUSE:
                raise self._refused("it closes the connection after our proof") from exc
            return None
        return sock

    def unreachable(self) -> RendezvousError:
        """The error of a deadline that passed."""
        return RendezvousError(
            f"{self._what()} could not be reached from {socket.gethostname()} (pid {os.getpid()}): "
            f"tried {', '.join(self._tried) or 'no address'} for "
            f"{time.monotonic() - self._started:.1f} s; last reason: {self._reason}. Check that "
            f"the process that hosts it (rank 0 or `ferro run`) is alive, that host and port are "
            f"right, and that no firewall is between."
        )

    def _refused(self, reason: str) -> AuthenticationError:
        return AuthenticationError(
            f"{self._what()} and this process (pid {os.getpid()} on {socket.gethostname()}) do "
            f"not hold the same secret: {reason}. Check that FERRO_SECRET is the same on all "
            f"ranks, and that both belong to one job and this port to its {self._service()}."
        )

    def _what(self) -> str:
        return f"the {self._service()} at {show_address(self._host, self._port)}"

    def _service(self) -> str:
        return self._purpose.decode(errors="replace")


def _authenticate(sock: socket.socket, conversation: handshake.Handshake, deadline: float) -> None:
    sock.sendall(conversation.opening)
    while conversation.wants:
        set_deadline(sock, deadline)
        try:
            data = sock.recv(conversation.wants)
        except TimeoutError:
            raise TimeoutError("it accepts the connection, but does not answer") from None
        if not data:
            raise ConnectionResetError("it closed the connection during the handshake")
        sock.sendall(conversation.feed(data))
