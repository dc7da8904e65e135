"""The store of a job: find the one that runs, or have rank 0 host one and the others connect to it.

| the launcher gives                  | the store                                               |
|-------------------------------------|---------------------------------------------------------|
| FERRO_STORE (`ferro run`)           | runs there already                                      |
| MASTER_ADDR and MASTER_PORT         | rank 0 hosts it there                                   |
| the same, by torchrun, whose agent  | on one host: as below; on several: rank 0 hosts it on   |
| listens on that port itself         | the next port                                           |
| nothing, ranks on one host          | rank 0 hosts it on loopback, on a free port, and writes |
|                                     | the address to the host's rendezvous file               |
| nothing, ranks on several hosts     | rank 0 hosts it on a free port, and the backend's own   |
|                                     | library broadcasts the addresses, where it can          |
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass, field

from ferro.errors import FerroError, RendezvousError, UsageError
from ferro.rendezvous.auth.secret import SECRET_BYTES, derive, per_user_secret
from ferro.rendezvous.meeting import rendezvous_file
from ferro.rendezvous.sockets import own_addresses
from ferro.rendezvous.store.client import StoreClient
from ferro.rendezvous.store.interface import StoreTimeout
from ferro.rendezvous.store.server import StoreServer
from ferro.runtime.environment import Address, LaunchInfo, format_address, parse_address
from ferro.types import BootstrapBroadcast

_OPEN_S = 1.0  # how long a store may run before its host opens it
_ATTEMPT_S = 3.0  # for one of the addresses that rank 0 broadcast, as long as there are others


@dataclass(slots=True, kw_only=True)
class JobStore:
    """A connection to the job's store, and what was opened for it."""

    store: StoreClient
    secret: bytes = field(repr=False)
    server: StoreServer | None = None  # where this rank hosts the store
    file_name: str = ""  # of the rendezvous file that holds the store's address, if there is one

    def close(self, orderly: bool = True) -> None:
        """Disconnect, and end the store where this rank hosts it: see `StoreServer.close`. Idempotent."""
        self.store.close()
        if self.file_name:
            rendezvous_file.remove(self.file_name)
        if self.server is not None:
            self.server.close(orderly=orderly)


def open_job_store(
    info: LaunchInfo, number: int, *, deadline: float, broadcast: BootstrapBroadcast | None = None
) -> JobStore:
    """Connect to the job's store before `deadline`, hosting it where this rank has to.

    `number` counts the stores that this process opened before, the same on all ranks: it keeps a rank that is
    early from entering the previous world's store, which is about to close. `broadcast` is the backend's
    `bootstrap_broadcast`, given where the launcher tells no address.
    """
    if broadcast is not None:
        return _open_by_broadcast(info, number, broadcast, deadline)
    one_host = info.local_world_size == info.world_size
    job = info.job if one_host or info.master is None else f"{info.launcher}:{format_address(info.master)}"
    secret = info.secret or derive(per_user_secret(), job)
    if info.store is not None:
        return JobStore(store=StoreClient(info.store, secret, deadline=deadline), secret=secret)
    if one_host and (info.master is None or info.master_port_taken):
        return _open_by_file(info, number, secret, deadline)
    if info.master is None:
        raise UsageError(
            f"{info.describe()}: the ranks are on several hosts, and nothing says where to meet. Set MASTER_ADDR and "
            "MASTER_PORT to an address of rank 0's host and a free port, or start the job with `ferro run`."
        )
    address = (info.master[0], info.master[1] + info.master_port_taken)
    if info.rank == 0:
        server = StoreServer(_listening_host(address[0]), address[1], secret=secret)
        return _open_hosted(server, address, number, secret, deadline)
    return _join(address, number, secret, deadline)


def _open_by_file(info: LaunchInfo, number: int, secret: bytes, deadline: float) -> JobStore:
    """Host or join a store on loopback, whose address is in the host's rendezvous file."""
    name = f"store {number} of {info.job}"
    if info.rank == 0:
        server = StoreServer(secret=secret)
        return _open_hosted(server, server.address, number, secret, deadline, name)
    started = time.monotonic()
    try:
        text = rendezvous_file.read(name, deadline=deadline)
    except RendezvousError as error:
        raise RendezvousError(
            f"{info.describe()}: waited {time.monotonic() - started:.1f} s on {socket.gethostname()} (pid "
            f"{os.getpid()}) for rank 0 to start its store; ranks of one host meet through a file there ({error})",
            rank=info.rank,
            peer=0,
        ) from error
    return _join(parse_address(text, source="rendezvous file"), number, secret, deadline)


def _open_by_broadcast(info: LaunchInfo, number: int, broadcast: BootstrapBroadcast, deadline: float) -> JobStore:
    """Host or join a store whose addresses rank 0 broadcasts through the backend's library.

    The message is trusted as the launcher is: it came over connections that the launcher made.
    """
    if info.rank:
        return _join_first(info, broadcast(info.rank, info.world_size, None, deadline), number, deadline)
    secret = info.secret or secrets.token_bytes(SECRET_BYTES)
    server = StoreServer("", secret=secret)
    addresses, port = own_addresses(), server.address[1]
    message = json.dumps({"addresses": addresses, "port": port, "secret": secret.hex()}).encode()
    try:
        broadcast(0, info.world_size, message, deadline)
    except BaseException:
        server.close()
        raise
    # This rank does not use loopback, since the others learn the address by which it reached the store.
    return _open_hosted(server, (addresses[0], port), number, secret, deadline)


def _join_first(info: LaunchInfo, message: bytes, number: int, deadline: float) -> JobStore:
    """Join rank 0's store at the first of its addresses that answers."""
    fields = json.loads(message)
    addresses, port, secret = fields["addresses"], fields["port"], bytes.fromhex(fields["secret"])
    failure = ""
    while True:
        for address in addresses:
            until = min(deadline, time.monotonic() + _ATTEMPT_S)
            try:
                StoreClient((address, port), secret, deadline=until).close()
            except (FerroError, TimeoutError) as error:
                failure = f"{address}: {error}"
            else:
                return _join((address, port), number, secret, deadline)
        if time.monotonic() >= deadline:
            raise RendezvousError(
                f"{info.describe()}: rank 0 hosts the store at port {port} of {', '.join(addresses)}, and none of "
                f"these answers from here. Set MASTER_ADDR and MASTER_PORT to one that does. {failure}",
                rank=info.rank,
                peer=0,
            )


def _open_hosted(
    server: StoreServer, address: Address, number: int, secret: bytes, deadline: float, file_name: str = ""
) -> JobStore:
    """Publish the address of the store that this rank hosts, connect to it, and open it to the others."""
    try:
        if file_name:
            rendezvous_file.write(file_name, format_address(address))
        store = StoreClient(address, secret, deadline=deadline, host=0)
        store.set(f"open/{number}", b"1")
    except BaseException:
        server.close()
        raise
    return JobStore(store=store, secret=secret, server=server, file_name=file_name)


def _join(address: Address, number: int, secret: bytes, deadline: float) -> JobStore:
    """Connect to the store that rank 0 hosts, once it has opened the one of this number."""
    while True:
        store = StoreClient(address, secret, deadline=deadline, host=0)
        try:
            store.get(f"open/{number}", deadline=min(deadline, time.monotonic() + _OPEN_S))
        except (RendezvousError, StoreTimeout):
            store.close()
            if time.monotonic() >= deadline:
                raise
        else:
            return JobStore(store=store, secret=secret)


def _listening_host(host: str) -> str:
    """Choose where rank 0 listens: at the address asked for, but never at a host name's loopback.

    Debian gives a host's own name the address 127.0.1.1, which no other host can reach.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        if host != "localhost" and ipaddress.ip_address(str(found[0][4][0])).is_loopback:
            return ""
    return host
