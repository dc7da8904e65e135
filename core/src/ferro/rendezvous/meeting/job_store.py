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

import json
import os
import secrets
import socket
import time
from dataclasses import dataclass, field, replace

from ferro.errors import FerroError, RendezvousError, UsageError
from ferro.rendezvous.auth.secret import SECRET_BYTES, derive, per_user_secret
from ferro.rendezvous.meeting import rendezvous_file
from ferro.rendezvous.sockets import is_loopback, own_address, own_addresses
from ferro.rendezvous.store.client import StoreClient
from ferro.rendezvous.store.server import StoreServer
from ferro.runtime.environment import Address, LaunchInfo, format_address, parse_address
from ferro.types import BootstrapBroadcast

_STALE_S = 1.0  # after which a rendezvous file whose address does not answer is read again
_STALE_PAUSE_S = 0.05
_ATTEMPT_S = 3.0  # for one of the addresses that rank 0 broadcast, as long as there are others


@dataclass(slots=True, kw_only=True)
class JobStore:
    """A connection to the job's store, and what was opened for it."""

    store: StoreClient
    secret: bytes = field(repr=False)
    server: StoreServer | None = None  # where this rank hosts the store
    file_name: str = ""  # of the rendezvous file that holds the store's address, if there is one
    # Rank 0 hosts another store for its next world: a rank that came to the end of this one may look for that.
    reopens: bool = False

    def close(self, orderly: bool = True) -> None:
        """Disconnect, and end the store where this rank hosts it: see `StoreServer.close`. Idempotent."""
        self.store.close()
        if self.file_name:
            rendezvous_file.remove(self.file_name)
        if self.server is not None:
            self.server.close(orderly=orderly)


def open_job_store(info: LaunchInfo, *, deadline: float, broadcast: BootstrapBroadcast | None = None) -> JobStore:
    """Connect to the job's store before `deadline`, hosting it where this rank has to.

    `broadcast` is the backend's `bootstrap_broadcast`, given where the launcher tells no address.
    """
    if broadcast is not None:
        return _open_by_broadcast(info, broadcast, deadline)
    one_host = info.local_world_size == info.world_size
    # The address alone: a world may be made again there with more ranks, by arguments or by a launcher.
    job = info.job if info.master is None else format_address(info.master)
    secret = info.secret or derive(per_user_secret(), job)
    if info.store is not None:
        return JobStore(store=StoreClient(info.store, secret, deadline=deadline), secret=secret)
    if one_host and (info.master is None or info.master_port_taken):
        return _open_by_file(info, secret, deadline)
    if info.master is None:
        raise UsageError(
            f"{info.describe()}: the ranks are on several hosts, and nothing says where to meet. Set MASTER_ADDR and "
            "MASTER_PORT to an address of rank 0's host and a free port, or start the job with `ferro run`."
        )
    address = (info.master[0], info.master[1] + info.master_port_taken)
    if info.rank == 0:
        host = address[0]
        # `localhost` may be all that rank 0 is told though others are elsewhere, unless the launcher says otherwise.
        here = one_host and is_loopback(host)
        server = StoreServer(
            "" if not here or (host == "localhost" and info.assumed) else host, address[1], secret=secret
        )
        # The others learn the address by which this rank reached the store.
        return _open_hosted(server, (host if here else own_address(host), address[1]), secret, deadline)
    return _join(address, secret, deadline)


def _open_by_file(info: LaunchInfo, secret: bytes, deadline: float) -> JobStore:
    """Host or join a store on loopback, whose address is in the host's rendezvous file."""
    name = f"store of {info.job}"
    if info.rank == 0:
        server = StoreServer(secret=secret)
        return _open_hosted(server, server.address, secret, deadline, name)
    started = time.monotonic()
    try:
        while True:
            address = parse_address(rendezvous_file.read(name, deadline=deadline), source="rendezvous file")
            try:
                return _join(address, secret, min(deadline, time.monotonic() + _STALE_S))
            except RendezvousError:  # the file may be of a rank 0 that was killed
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_STALE_PAUSE_S)
    except RendezvousError as error:
        raise RendezvousError(
            f"{info.describe()}: waited {time.monotonic() - started:.1f} s on {socket.gethostname()} (pid "
            f"{os.getpid()}) for rank 0 to start its store; ranks of one host meet through a file there ({error})",
            rank=info.rank,
            peer=0,
        ) from error


def _open_by_broadcast(info: LaunchInfo, broadcast: BootstrapBroadcast, deadline: float) -> JobStore:
    """Host or join a store whose addresses rank 0 broadcasts through the backend's library.

    The message is trusted as the launcher is: it came over connections that the launcher made.
    """
    if info.rank:
        return _join_first(info, broadcast(info.rank, info.world_size, None, deadline), deadline)
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
    return _open_hosted(server, (addresses[0], port), secret, deadline)


def _join_first(info: LaunchInfo, message: bytes, deadline: float) -> JobStore:
    """Join rank 0's store at the first of its addresses that answers."""
    fields = json.loads(message)
    addresses, port, secret = fields["addresses"], fields["port"], bytes.fromhex(fields["secret"])
    failure = ""
    while True:
        for address in addresses:
            until = min(deadline, time.monotonic() + _ATTEMPT_S)
            try:
                return replace(_join((address, port), secret, until), reopens=False)
            except (FerroError, TimeoutError) as error:
                failure = f"{address}: {error}"
        if time.monotonic() >= deadline:
            raise RendezvousError(
                f"{info.describe()}: rank 0 hosts the store at port {port} of {', '.join(addresses)}, and none of "
                f"these answers from here. Set MASTER_ADDR and MASTER_PORT to one that does. {failure}",
                rank=info.rank,
                peer=0,
            )


def _open_hosted(
    server: StoreServer, address: Address, secret: bytes, deadline: float, file_name: str = ""
) -> JobStore:
    """Publish the address of the store that this rank hosts, and connect to it."""
    try:
        if file_name:
            rendezvous_file.write(file_name, format_address(address))
        store = StoreClient(address, secret, deadline=deadline, host=0)
    except BaseException:
        server.close()
        raise
    return JobStore(store=store, secret=secret, server=server, file_name=file_name)


def _join(address: Address, secret: bytes, deadline: float) -> JobStore:
    """Connect to the store that rank 0 hosts."""
    return JobStore(store=StoreClient(address, secret, deadline=deadline, host=0), secret=secret, reopens=True)
