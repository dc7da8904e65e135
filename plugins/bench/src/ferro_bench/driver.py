"""The driver: starts worlds, and is where all their ranks report."""

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
from ferro_bench.world import World

_HOST = "127.0.0.1"
_SECRET_BYTES = 32
_CONNECT_S = 120.0  # importing torch in many ranks on few cores takes its time
_LEAVE_S = 10.0
_TICK_S = 0.2


@contextlib.contextmanager
def open_worlds(plans: Sequence[WorldPlan]) -> Iterator[dict[str, World]]:
    """Start worlds; yield them by name when all their ranks wait for orders; end them.

    Raises:
        BackendError: a world could not be started, or ended at once, or took too long.
    """
    worlds: dict[str, World] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ferro-bench-")))
        secret = secrets.token_bytes(_SECRET_BYTES)
        listener = listen(_HOST)
        port = listener.getsockname()[1]
        contact = {"host": _HOST, "port": port, "secret": secret.hex()}
        reception = stack.enter_context(contextlib.closing(_Reception(listener, secret)))
        for plan in plans:
            world = World(plan, folder, contact)
            stack.callback(world.close)
            worlds[plan.name] = world
        reception.wait_for(worlds)
        yield worlds
        # Not where something failed: who waits for a dead rank would only use up the time.
        for world in worlds.values():
            world.dismiss(_LEAVE_S)


class _Reception:
    """Where ranks connect, prove that they hold the secret, and say who they are."""

    def __init__(self, listener: socket.socket, secret: bytes) -> None:
        self._selector = selectors.DefaultSelector()
        self._worlds: dict[str, World] = {}
        self._silent: set[Link] = set()
        self._gate = Listener(listener, secret, purpose=PURPOSE, selector=self._selector, admit=self._admit)

    def wait_for(self, worlds: dict[str, World]) -> None:
        """Return when all ranks of all worlds have reported."""
        self._worlds = worlds
        deadline = time.monotonic() + _CONNECT_S
        while late := [world for world in worlds.values() if not world.complete()]:
            for key, events in self._selector.select(_TICK_S):
                key.data(events)
            self._gate.expire()
            if time.monotonic() > deadline:
                what = f"was not complete within {_CONNECT_S:g} s"
                raise late[0].failure(what, ending=False)

    def close(self) -> None:
        """Stop listening, and close connections that never said whose they are."""
        self._gate.close()
        for link in self._silent:
            link.close()
        self._selector.close()

    def _admit(self, sock: socket.socket) -> None:
        link = Link(sock)
        self._silent.add(link)
        self._selector.register(link, selectors.EVENT_READ, lambda _events: self._hear(link))

    def _hear(self, link: Link) -> None:
        try:
            hello = link.take()
        except EOFError:
            hello = {}
        if hello is None:
            return
        self._selector.unregister(link)
        self._silent.discard(link)
        if hello.get("world") in self._worlds:
            self._worlds[hello["world"]].welcome(link, hello)
        else:
            link.close()
