"""PipesBackend: ranks of one host, with a pipe from each of them to every other.

A pipe is a Unix socket that is used one way. Through it go frames: a tag, a size, and so many
bytes. For every pipe a thread reads what comes and keeps it until it is asked for by its tag; so
messages may be received in any order, and a sender waits only for a peer that is far behind.
"""

import struct
import threading
import time
from contextlib import ExitStack, suppress
from socket import AF_UNIX, SHUT_RDWR, create_server, socket
from tempfile import TemporaryDirectory

import numpy as np

from ferro import Backend, BackendConfig, FerroError, GroupClosed, PeerLost

_HEAD = struct.Struct("<QQ")  # tag, number of bytes
_MOST_KEPT = 4096  # messages of one peer; then its pipe is not read until some are received


class PipesBackend(Backend):
    """One rank, with a pipe to and a pipe from each of the others."""

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config.rank, config.world_size, config.choice)
        deadline, store = time.monotonic() + config.timeout_s, config.store.prefix("pipes")
        self._to = {peer: socket(AF_UNIX) for peer in range(self.world_size) if peer != self.rank}
        # To send, one at a time. Who waits for its turn waits no longer than the deadlines of those
        # before it, yet maybe longer than its own: a lock with a timeout would be stricter.
        self._turns = {peer: threading.Lock() for peer in self._to}
        self._changed = threading.Condition()  # guards the next two
        self._kept: dict[int, list[tuple[int, bytes]]] = {peer: [] for peer in self._to}
        self._ends: dict[int, FerroError] = {}  # why nothing more comes from a peer
        # A folder that no other user can enter. Connected pipes need no name: it is gone before
        # the first message, and a rank that is killed leaves nothing behind.
        with ExitStack() as undo, TemporaryDirectory() as home:
            undo.callback(self.close)  # should connecting fail
            with create_server(f"{home}/door", family=AF_UNIX, backlog=self.world_size) as door:
                door.settimeout(config.timeout_s)
                store.set(f"door/{self.rank}", f"{home}/door".encode())
                for peer, pipe in self._to.items():  # there is room for all: neither step waits
                    pipe.connect(store.get(f"door/{peer}", deadline=deadline).decode())
                    pipe.sendall(_HEAD.pack(self.rank, 0))  # who it is
                for _ in self._to:
                    threading.Thread(target=self._read, args=door.accept(), daemon=True).start()
            undo.pop_all()

    def send(self, buffer: np.ndarray, peer: int, *, tag: int, deadline: float) -> None:
        """Write a frame."""
        with self._turns[peer]:
            try:
                self._to[peer].settimeout(max(1e-3, deadline - time.monotonic()))
                self._to[peer].sendall(_HEAD.pack(tag, buffer.nbytes) + buffer.tobytes())
            except OSError as error:
                self._to[peer].close()  # the frame may be cut short: nothing can follow it
                lost = self._ends.get(peer, PeerLost(str(error), peer=peer))
                raise TimeoutError() if isinstance(error, TimeoutError) else lost from error

    def recv(self, buffer: np.ndarray, peer: int, *, tag: int, deadline: float) -> None:
        """Take the first message with this tag, as soon as it has come."""
        with self._changed:
            while (found := next((m for m in self._kept[peer] if m[0] == tag), None)) is None:
                if peer in self._ends or not self._changed.wait(deadline - time.monotonic()):
                    raise self._ends.get(peer, TimeoutError(f"nothing came from rank {peer}"))
            self._kept[peer].remove(found)
            self._changed.notify_all()  # there is room for more
        buffer.view(np.uint8)[...] = np.frombuffer(found[1], np.uint8)

    def close(self) -> None:
        """Wake who waits, and close the pipes, which the other ranks notice; so does `abort`."""
        with self._changed:
            self._ends = dict.fromkeys(self._to, GroupClosed("the group has ended")) | self._ends
            self._changed.notify_all()
        for peer, pipe in self._to.items():
            with suppress(OSError):  # it may be closed already
                pipe.shutdown(SHUT_RDWR)  # wakes who is sending
            with self._turns[peer]:
                pipe.close()

    def _read(self, pipe: socket, _address: str) -> None:
        """Keep what comes through a pipe until it ends."""
        with pipe, pipe.makefile("rb") as stream, suppress(struct.error):  # if cut short
            peer, _ = _HEAD.unpack(stream.read(_HEAD.size))
            for tag, size in map(_HEAD.unpack, iter(lambda: stream.read(_HEAD.size), b"")):
                [message] = struct.unpack(f"{size}s", stream.read(size))
                with self._changed:
                    (kept := self._kept[peer]).append((tag, message))
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: len(kept) < _MOST_KEPT or peer in self._ends)
        with self._changed:
            self._ends.setdefault(peer, PeerLost("it has closed its pipe", peer=peer))
            self._changed.notify_all()
