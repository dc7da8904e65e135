"""The mesh: an authenticated connection from every rank to every other, made in parallel.

Every rank listens on the address by which it reached the store, says where in the store, and
dials all lower ranks while a thread lets the higher ones in. Both ends prove that they hold the
job's secret before anything else is read (`ferro.rendezvous`).
"""

from __future__ import annotations

import ipaddress
import selectors
import socket
import struct
import threading
import time

from ferro.errors import RendezvousError
from ferro.hookspecs import BackendConfig
from ferro.rendezvous import Listener, connect, listen

_PURPOSE = b"ferro-gloo mesh"
_HELLO = struct.Struct("<II")  # who calls, whom
_HELLO_S = 5.0
_BUFFER_BYTES = 4 << 20


def connect_mesh(config: BackendConfig) -> dict[int, socket.socket]:
    """Return the connected sockets by rank, for all ranks but this one.

    Raises:
        RendezvousError: a rank could not be reached, or did not come, by `config.timeout_s`.
    """
    deadline = time.monotonic() + config.timeout_s
    listener = listen(_listening_host(config))
    config.store.set(f"port/{config.rank}", str(listener.getsockname()[1]).encode())
    doorman = _Doorman(listener, config, deadline)
    sockets: dict[int, socket.socket] = {}
    try:
        for peer in range(config.rank):
            sockets[peer] = _dial(config, peer, deadline)
        sockets |= doorman.wait()
    except BaseException:
        doorman.stop()
        for sock in (*sockets.values(), *doorman.arrived.values()):
            sock.close()
        raise
    for sock in sockets.values():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    return sockets


def _listening_host(config: BackendConfig) -> str:
    """Return this rank's own address, or "" for all.

    All, when it reached the store over loopback and others did not: they cannot reach that.
    """
    own = config.addresses[config.rank]
    if _loopback(own) and not all(map(_loopback, config.addresses)):
        return ""
    return own


def _dial(config: BackendConfig, peer: int, deadline: float) -> socket.socket:
    host = config.addresses[peer]
    if _loopback(host) and not _loopback(config.addresses[config.rank]):
        host = config.store_host  # who reached the store over loopback lives where it lives
    try:
        port = int(config.store.get(f"port/{peer}", deadline=deadline))
    except TimeoutError as error:
        raise RendezvousError(
            f"rank {config.rank} waited {config.timeout_s:g} s for rank {peer} to listen: read "
            f"the log of rank {peer}",
            rank=config.rank,
            peer=peer,
        ) from error
    try:
        sock = connect((host, port), config.secret, purpose=_PURPOSE, deadline=deadline)
    except RendezvousError as error:
        raise type(error)(
            f"rank {config.rank} ({config.addresses[config.rank]}) cannot reach rank {peer}, "
            f"which advertises {host}: {error}",
            rank=config.rank,
            peer=peer,
        ) from error
    sock.sendall(_HELLO.pack(config.rank, peer))
    return sock


class _Doorman:
    """Lets the higher ranks in, in a thread of its own, until all are there."""

    def __init__(self, listener: socket.socket, config: BackendConfig, deadline: float) -> None:
        self.arrived: dict[int, socket.socket] = {}
        self._config = config
        self._deadline = deadline
        self._expected = set(range(config.rank + 1, config.world_size))
        self._stopping = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._gate = Listener(
            listener,
            config.secret,
            purpose=_PURPOSE,
            selector=self._selector,
            admit=self._admit,
        )
        self._thread = threading.Thread(target=self._work, name="ferro-gloo-mesh", daemon=True)
        self._thread.start()

    def wait(self) -> dict[int, socket.socket]:
        """Return the sockets of all higher ranks."""
        self._thread.join()
        missing = sorted(self._expected - set(self.arrived))
        if missing:
            raise RendezvousError(
                f"ranks {missing} did not connect to rank {self._config.rank} within "
                f"{self._config.timeout_s:g} s: read their logs",
                rank=self._config.rank,
                peer=missing[0],
            )
        return self.arrived

    def stop(self) -> None:
        """Let nobody in any more."""
        self._stopping.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._expected - set(self.arrived) and not self._stopping.is_set():
                if time.monotonic() > self._deadline:
                    return
                for key, events in self._selector.select(0.1):
                    key.data(events)
                self._gate.expire()
        finally:
            self._gate.close()
            self._selector.close()

    def _admit(self, sock: socket.socket) -> None:
        """Take a connection that has proved itself, when it is one that is expected."""
        try:
            sock.settimeout(_HELLO_S)
            caller, called = _HELLO.unpack(_receive(sock, _HELLO.size))
        except OSError:
            sock.close()
            return
        known = self._expected - set(self.arrived)
        if called != self._config.rank or caller not in known:
            sock.close()
            return
        self.arrived[caller] = sock


def _receive(sock: socket.socket, count: int) -> bytes:
    data = sock.recv(count, socket.MSG_WAITALL)
    if len(data) != count:
        raise ConnectionResetError("it closed the connection")
    return data


def _loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback
