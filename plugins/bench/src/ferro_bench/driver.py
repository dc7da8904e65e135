"""The driver starts the ranks of every library, and listens for their connections."""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ferro.rendezvous import Listener, listen
from ferro_bench.contestants import WorldPlan
from ferro_bench.link import Link
from ferro_bench.rank.channel import PURPOSE
from ferro_bench.world import BenchWorld

_HOST = "127.0.0.1"
_SECRET_BYTES = 32
_CONNECT_S = 120.0  # long, since many ranks import torch on few cores
_LEAVE_S = 10.0
_TICK_S = 0.2


@contextlib.contextmanager
def open_worlds(plans: Sequence[WorldPlan]) -> Iterator[dict[str, BenchWorld]]:
    """Start worlds; yield them by name once all their ranks wait for orders; end them afterwards.

    Raises:
        BackendError: a world could not be started, or ended at once, or took too long.
    """
    worlds: dict[str, BenchWorld] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ferro-bench-")))
        secret = secrets.token_bytes(_SECRET_BYTES)
        listener = listen(_HOST)
        port = listener.getsockname()[1]
        endpoint = {"host": _HOST, "port": port, "secret": secret.hex()}
        ranks = stack.enter_context(contextlib.closing(_RankListener(listener, secret)))
        for plan in plans:
            world = BenchWorld(plan, folder, endpoint)
            stack.callback(world.close)
            worlds[plan.name] = world
        ranks.wait_for(worlds)
        yield worlds
        # After a failure the worlds are only closed: ranks that wait for a dead one would use up the time.
        for world in worlds.values():
            world.shut_down(_LEAVE_S)


class _RankListener:
    """Accepts connections of ranks that hold the secret and say which rank of which world they are."""

    def __init__(self, listener: socket.socket, secret: bytes) -> None:
        self._selector = selectors.DefaultSelector()
        self._worlds: dict[str, BenchWorld] = {}
        self._unidentified: set[Link] = set()
        self._listener = Listener(listener, secret, purpose=PURPOSE, selector=self._selector, admit=self._admit)

    def wait_for(self, worlds: dict[str, BenchWorld]) -> None:
        """Wait until all ranks of all worlds are connected."""
        self._worlds = worlds
        deadline = time.monotonic() + _CONNECT_S
        while late := [world for world in worlds.values() if not world.complete()]:
            for key, events in self._selector.select(_TICK_S):
                key.data(events)
            self._listener.expire()
            if time.monotonic() > deadline:
                what = f"was not complete within {_CONNECT_S:g} s"
                raise late[0].failure(what, ending=False)

    def close(self) -> None:
        """Stop listening, and close connections of ranks that never identified themselves."""
        self._listener.close()
        for link in self._unidentified:
            link.close()
        self._selector.close()

    def _admit(self, sock: socket.socket) -> None:
        link = Link(sock)
        self._unidentified.add(link)
        self._selector.register(link, selectors.EVENT_READ, lambda _events: self._identify(link))

    def _identify(self, link: Link) -> None:
        try:
            hello = link.receive()
        except EOFError:
            hello = {}
        if hello is None:
            return
        self._selector.unregister(link)
        self._unidentified.discard(link)
        if hello.get("world") in self._worlds:
            self._worlds[hello["world"]].add_rank(link, hello)
        else:
            link.close()
