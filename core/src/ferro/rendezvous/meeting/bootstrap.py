"""Meeting through a library whose ranks are connected from the start: it hands on the address.

An mpiexec that starts ranks on several hosts gives them no address at which to meet, but MPI can
carry rank 0's message to all. What the message holds is trusted as the launcher is: it came over
connections that the launcher made.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import TypeAlias

from ferro.errors import FerroError, RendezvousError
from ferro.rendezvous import codec
from ferro.rendezvous.meeting.interfaces import own_addresses
from ferro.rendezvous.meeting.meeting import Meeting, host, visit
from ferro.rendezvous.store.client import StoreClient
from ferro.rendezvous.store.server import StoreServer
from ferro.runtime.environment import LaunchInfo

# (rank, world_size, rank 0's message and elsewhere None, deadline) -> rank 0's message.
Introduce: TypeAlias = "Callable[[int, int, bytes | None, float], bytes]"

_ATTEMPT_S = 3.0  # for one of rank 0's addresses, as long as there are others
_SECRET_BYTES = 32


def meet_introduced(info: LaunchInfo, number: int, introduce: Introduce, *, deadline: float) -> Meeting:
    """Connect to the store that rank 0 hosts and the library introduces; see `meeting.meet`.

    Raises:
        RendezvousError, AuthenticationError: the store cannot be hosted or reached.
    """
    if info.rank:
        return _visit(info, introduce(info.rank, info.world_size, None, deadline), number, deadline)
    secret = info.secret or secrets.token_bytes(_SECRET_BYTES)
    server = StoreServer("", secret=secret)
    addresses, port = own_addresses(), server.address[1]
    try:
        message = codec.encode({"addresses": addresses, "port": port, "secret": secret})
        introduce(0, info.world_size, message, deadline)
    except BaseException:
        server.close()
        raise
    # Not over loopback: what address this rank has is told to the others.
    return host(server, (addresses[0], port), number, secret, deadline)


def _visit(info: LaunchInfo, message: bytes, number: int, deadline: float) -> Meeting:
    """Enter rank 0's store at the first of its addresses that answers."""
    told = codec.decode(message)
    assert isinstance(told, dict), "an introduction is a table"
    addresses, port = [str(a) for a in told["addresses"]], int(told["port"])
    secret = bytes(told["secret"])
    failures: list[str] = []
    while True:
        for address in addresses:
            until = min(deadline, time.monotonic() + _ATTEMPT_S)
            try:
                StoreClient((address, port), secret, deadline=until).close()
            except (FerroError, TimeoutError) as error:
                failures.append(f"{address}: {error}")
                continue
            return visit((address, port), number, secret, deadline)
        if time.monotonic() >= deadline:
            raise RendezvousError(
                f"{info.describe()}: rank 0 hosts the store at port {port} of "
                f"{', '.join(addresses)}, and none of these answers from here. Set MASTER_ADDR "
                f"and MASTER_PORT to one that does. {failures[-1]}",
                rank=info.rank,
                peer=0,
            )
