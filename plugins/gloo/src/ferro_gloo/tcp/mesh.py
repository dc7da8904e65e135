"""The mesh: an authenticated connection between every two ranks, all made in parallel.

Every rank listens on the local address of its connection to the store, and publishes its port there. It connects to all
lower ranks while a thread accepts the higher ones. Both ends prove that they hold the job's secret before they read
anything else (`ferro.rendezvous`).
"""

from __future__ import annotations

import ipaddress
import os
import selectors
import socket
import struct
import threading
import time
import weakref

from ferro.errors import RendezvousError
from ferro.hookspecs import BackendConfig
from ferro.rendezvous import Listener, connect, listen

_PURPOSE = b"ferro-gloo mesh"
_IDENTIFICATION = struct.Struct("<II")  # the connecting rank, the rank that it wants
_IDENTIFY_TIMEOUT_S = 5.0
_BUFFER_BYTES = 4 << 20

_acceptors: weakref.WeakSet[_Acceptor] = weakref.WeakSet()


def connect_mesh(config: BackendConfig) -> dict[int, socket.socket]:
    """Connect to all other ranks; return the sockets by rank.

    Raises:
        RendezvousError: a rank could not be reached, or did not come, by `config.timeout_s`.
    """
    deadline = time.monotonic() + config.timeout_s
    listener = listen(_listening_host(config))
    config.store.set(f"port/{config.rank}", str(listener.getsockname()[1]).encode())
    acceptor = _Acceptor(listener, config, deadline)
    sockets = acceptor.sockets
    try:
        for peer in range(config.rank):
            sockets[peer] = _connect_to(config, peer, deadline)
        acceptor.wait()
    except BaseException:
        acceptor.stop()
        for sock in sockets.values():
            sock.close()
        raise
    for sock in sockets.values():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    return sockets


def _listening_host(config: BackendConfig) -> str:
    """Return this rank's own address, or "" for all interfaces.

    A rank that reached the store over loopback listens on all interfaces if another rank did not, because that one
    cannot reach its loopback address.
    """
    own = config.addresses[config.rank]
    if _is_loopback(own) and not all(map(_is_loopback, config.addresses)):
        return ""
    return own


def _connect_to(config: BackendConfig, peer: int, deadline: float) -> socket.socket:
    host = config.addresses[peer]
    if _is_loopback(host) and not _is_loopback(config.addresses[config.rank]):
        host = config.store_host  # the peer reached the store over loopback: they share a host
    try:
        port = int(config.store.get(f"port/{peer}", deadline=deadline))
    except TimeoutError as error:
        raise RendezvousError(
            f"rank {config.rank} waited {config.timeout_s:g} s for rank {peer} to listen: read the log of rank {peer}",
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
    sock.sendall(_IDENTIFICATION.pack(config.rank, peer))
    return sock


class _Acceptor:
    """Accepts the higher ranks in a thread of its own until all have connected.

    Attributes:
        sockets: the sockets of all connected ranks; the caller adds those of the lower ones.
    """

    def __init__(self, listener: socket.socket, config: BackendConfig, deadline: float) -> None:
        self.sockets: dict[int, socket.socket] = {}
        self._config = config
        self._deadline = deadline
        self._expected = set(range(config.rank + 1, config.world_size))
        self._stopping = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._listener = Listener(listener, config.secret, purpose=_PURPOSE, selector=self._selector, admit=self._admit)
        _acceptors.add(self)
        self._thread = threading.Thread(target=self._run, name="ferro-gloo-mesh", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for all higher ranks."""
        self._thread.join()
        missing = sorted(self._expected - set(self.sockets))
        if missing:
            raise RendezvousError(
                f"ranks {missing} did not connect to rank {self._config.rank} within "
                f"{self._config.timeout_s:g} s: read their logs",
                rank=self._config.rank,
                peer=missing[0],
            )

    def stop(self) -> None:
        """Accept nothing more, and end the thread."""
        self._stopping.set()
        self._thread.join()

    def close_in_child(self) -> None:
        """Close a forked child's copies of the sockets; what the parent's selector watches does not change by that."""
        watched = [key.fileobj for key in (self._selector.get_map() or {}).values()]
        for sock in (*watched, *self.sockets.values()):
            if isinstance(sock, socket.socket):
                sock.close()
        self._selector.close()

    def _run(self) -> None:
        try:
            while self._expected - set(self.sockets) and not self._stopping.is_set():
                if time.monotonic() > self._deadline:
                    return
                for key, events in self._selector.select(0.1):
                    key.data(events)
                self._listener.expire()
        finally:
            self._listener.close()
            self._selector.close()

    def _admit(self, sock: socket.socket) -> None:
        """Keep an authenticated connection if its rank is still expected; close it otherwise."""
        try:
            sock.settimeout(_IDENTIFY_TIMEOUT_S)
            caller, called = _IDENTIFICATION.unpack(_receive(sock, _IDENTIFICATION.size))
        except OSError:
            sock.close()
            return
        known = self._expected - set(self.sockets)
        if called != self._config.rank or caller not in known:
            sock.close()
            return
        self.sockets[caller] = sock


def _receive(sock: socket.socket, count: int) -> bytes:
    data = sock.recv(count, socket.MSG_WAITALL)
    if len(data) != count:
        raise ConnectionResetError("it closed the connection")
    return data


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _close_copies() -> None:
    for acceptor in list(_acceptors):
        acceptor.close_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies)
