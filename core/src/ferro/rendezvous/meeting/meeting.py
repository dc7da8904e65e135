"""Where the ranks of a job meet: find the store that runs, or have rank 0 host one.

| launcher gives                      | the store                                               |
|-------------------------------------|---------------------------------------------------------|
| FERRO_STORE (`ferro run`)           | runs there already                                      |
| MASTER_ADDR and MASTER_PORT         | rank 0 hosts it there                                   |
| the same, by torchrun, whose agent  | on one host: as below; on several: rank 0 hosts it on   |
| listens on that port itself         | the next port                                           |
| nothing, ranks on one host          | rank 0 hosts it on loopback, on a free port, and posts   |
|                                     | the address in the host's rendezvous file               |
| nothing, ranks on several hosts     | rank 0 hosts it on a free port, and the backend's own   |
|                                     | library tells the others, where it can: `introduction`  |
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from dataclasses import dataclass, field

from ferro.errors import RendezvousError, UsageError
from ferro.rendezvous.auth.secret import derive, per_user_secret
from ferro.rendezvous.meeting import rendezvous_file
from ferro.rendezvous.store.client import StoreClient
from ferro.rendezvous.store.interface import StoreTimeout
from ferro.rendezvous.store.server import StoreServer
from ferro.runtime.environment import Address, LaunchInfo, format_address, parse_address

_OPEN_S = 1.0  # how long a store may be there before its host has opened it


@dataclass(slots=True, kw_only=True)
class Meeting:
    """A connection to the job's store, and what was opened to have it.

    Attributes:
        store: the connected client.
        secret: the job's secret.
        server: the store itself, where this rank hosts it.
        note: name of the rendezvous file's note that tells its address, or "".
    """

    store: StoreClient
    secret: bytes = field(repr=False)
    server: StoreServer | None = None
    note: str = ""

    def close(self) -> None:
        """Leave the store; end it where this rank hosts it. Idempotent."""
        self.store.close()
        if self.note:
            rendezvous_file.remove(self.note)
            self.note = ""
        if self.server is not None:
            self.server.close()


def meet(info: LaunchInfo, number: int, *, explicit: bool, deadline: float) -> Meeting:
    """Connect to the job's store, hosting it where this rank has to.

    Args:
        info: this process's place.
        number: how often this process has met before; all ranks count alike. It keeps a rank
            that comes back early from entering the last meeting's store, which is about to close.
        explicit: the program itself named `info.master`: meet there, nowhere else.
        deadline: absolute `time.monotonic()` second by which to be connected.

    Raises:
        RendezvousError, AuthenticationError: the store cannot be hosted or reached.
        UsageError: ranks on several hosts, and nothing says where to meet.
    """
    here = info.local_world_size == info.world_size
    secret = info.secret or derive(per_user_secret(), _job(info, here))
    if info.store is not None:
        return Meeting(store=StoreClient(info.store, secret, deadline=deadline), secret=secret)
    if here and not explicit and (info.master is None or info.master_port_taken):
        return _meet_here(info, number, secret, deadline)
    address = _agreed_address(info)
    if info.rank == 0:
        server = StoreServer(_listening_host(address[0]), address[1], secret=secret)
        return host(server, address, number, secret, deadline)
    return visit(address, number, secret, deadline)


def _meet_here(info: LaunchInfo, number: int, secret: bytes, deadline: float) -> Meeting:
    """Meet on loopback, through the host's rendezvous file."""
    note = f"store {number} of {info.job}"
    if info.rank:
        started = time.monotonic()
        try:
            text = rendezvous_file.read(note, deadline=deadline)
        except RendezvousError as error:
            raise RendezvousError(
                f"{info.describe()}: waited {time.monotonic() - started:.1f} s on "
                f"{socket.gethostname()} (pid {os.getpid()}) for rank 0 to start its store; ranks "
                f"of one host meet through notes there ({error})",
                rank=info.rank,
                peer=0,
            ) from error
        return visit(parse_address(text, source="rendezvous file"), number, secret, deadline)
    server = StoreServer(secret=secret)
    rendezvous_file.post(note, format_address(server.address))
    return host(server, server.address, number, secret, deadline, note)


def host(server: StoreServer, address: Address, number: int, secret: bytes, deadline: float, note: str = "") -> Meeting:
    """Enter the store that this rank hosts, and open it."""
    try:
        store = StoreClient(address, secret, deadline=deadline)
        store.set(f"open/{number}", b"1")
    except BaseException:
        server.close()
        raise
    return Meeting(store=store, secret=secret, server=server, note=note)


def visit(address: Address, number: int, secret: bytes, deadline: float) -> Meeting:
    """Enter the store that rank 0 hosts, once it is this meeting's."""
    while True:
        store = StoreClient(address, secret, deadline=deadline)
        try:
            store.get(f"open/{number}", deadline=min(deadline, time.monotonic() + _OPEN_S))
        except (RendezvousError, StoreTimeout):
            store.close()
            if time.monotonic() >= deadline:
                raise
        else:
            return Meeting(store=store, secret=secret)


def _job(info: LaunchInfo, here: bool) -> str:
    """Return a text that all ranks share, also between hosts."""
    if here or info.master is None:
        return info.job
    return f"{info.launcher}:{format_address(info.master)}"


def _agreed_address(info: LaunchInfo) -> Address:
    if info.master is None:
        raise UsageError(
            f"{info.describe()}: the ranks are on several hosts, and nothing says where to meet. "
            "Set MASTER_ADDR and MASTER_PORT to an address of rank 0's host and a free port, or "
            "start the job with `ferro run`."
        )
    host, port = info.master
    return (host, port + 1) if info.master_port_taken else (host, port)


def _listening_host(host: str) -> str:
    """Return where rank 0 listens: the address asked for, but never a host name's loopback.

    Debian gives a host's own name the address 127.0.1.1, which no other host can reach.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(entry[4][0])) for entry in found]
        if host != "localhost" and addresses[0].is_loopback:
            return ""
    return host
