"""How the ranks of one attempt find each other: a store of their own, with a secret of its own."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

from ferro.launch.nodes import Meeting
from ferro.launch.options import LaunchOptions
from ferro.rendezvous import StoreServer, derive, per_user_secret
from ferro.runtime.environment import Address, read_secret

_LOOPBACK = "127.0.0.1"
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """What each rank of an attempt is told.

    Attributes:
        store: the address of their store.
        master: a free address for programs that use torch.distributed as well.
        secret: the attempt's secret.
    """

    store: Address
    master: Address
    secret: bytes = field(repr=False)


@contextlib.contextmanager
def meet(options: LaunchOptions) -> Iterator[Meeting | None]:
    """The meeting with the other nodes' launchers, or None where there are none.

    Raises:
        AuthenticationError: there is no secret that the nodes could share.
    """
    if options.nnodes == 1:
        yield None
        return
    with Meeting(options, derive(_shared_secret(), "launchers")) as meeting:
        yield meeting


@contextlib.contextmanager
def open_contact(attempt: int, meeting: Meeting | None) -> Iterator[Contact]:
    """Host the attempt's store here, or learn where node 0 hosts it.

    Nothing is kept between attempts, so no key or secret of one is left over in the next.
    """
    if meeting is None:
        secret = secrets.token_bytes(_SECRET_BYTES)
        with StoreServer(_LOOPBACK, secret=secret) as server:
            master = (_LOOPBACK, _free_port(_LOOPBACK))
            yield Contact(store=server.address, master=master, secret=secret)
        return
    secret = derive(_shared_secret(), f"ranks of attempt {attempt}")
    if meeting.node_rank > 0:
        store, master = meeting.contact(attempt)
        yield Contact(store=store, master=master, secret=secret)
        return
    with StoreServer(meeting.host, secret=secret) as server:
        store = (meeting.host, server.address[1])
        master = (meeting.host, _free_port(meeting.host))
        meeting.share_contact(attempt, store, master)
        yield Contact(store=store, master=master, secret=secret)


def _shared_secret() -> bytes:
    """What all nodes have: FERRO_SECRET, or the user's secret in a shared home directory."""
    return read_secret() or per_user_secret()


def _free_port(host: str) -> int:
    """A port that nobody listens on now."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.bind(address)
        port: int = probe.getsockname()[1]
    return port
