"""PipesBackend: ranks of one host, with a pipe from each rank to every other.

A pipe is a Unix socket that is used one way. It carries frames: a tag, a size, and the bytes of a
message. A thread for each pipe reads messages and keeps them until `recv` asks for their tag. So
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

_HEADER = struct.Struct("<QQ")  # tag, number of bytes
_MAX_QUEUED = 4096  # messages of one peer; its pipe is not read while there are more


class PipesBackend(Backend):
    """One rank, with a pipe to and a pipe from each of the others."""

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config.rank, config.world_size, config.choice)
        deadline, store = time.monotonic() + config.timeout_s, config.store.prefix("pipes")
        self._to = {peer: socket(AF_UNIX) for peer in range(self.world_size) if peer != self.rank}
        # One thread at a time sends to a peer. A thread may wait longer for the lock than its own
        # deadline, but not longer than those of the sends before it.
        self._send_locks = {peer: threading.Lock() for peer in self._to}
        self._changed = threading.Condition()  # guards the next two
        self._received: dict[int, list[tuple[int, bytes]]] = {peer: [] for peer in self._to}
        self._lost: dict[int, FerroError] = {}  # why a peer sends no more messages
        # No other user can enter this folder. Connected pipes need no name, so the folder is
        # removed before the first message, and a rank that is killed leaves nothing behind.
        with ExitStack() as undo, TemporaryDirectory() as folder:
            undo.callback(self.close)  # if connecting fails
            with create_server(f"{folder}/s", family=AF_UNIX, backlog=self.world_size) as listener:
                listener.settimeout(config.timeout_s)
                store.set(f"path/{self.rank}", f"{folder}/s".encode())
                for peer, pipe in self._to.items():  # the backlog has room: no call here blocks
                    pipe.connect(store.get(f"path/{peer}", deadline=deadline).decode())
                    pipe.sendall(_HEADER.pack(self.rank, 0))  # tells the peer this rank
                for _ in self._to:
                    threading.Thread(target=self._read, args=listener.accept(), daemon=True).start()
            undo.pop_all()

    def send(self, buffer: np.ndarray, peer: int, *, tag: int, deadline: float) -> None:
        """Write a frame to the peer's pipe."""
        with self._send_locks[peer]:
            try:
                self._to[peer].settimeout(max(1e-3, deadline - time.monotonic()))
                self._to[peer].sendall(_HEADER.pack(tag, buffer.nbytes) + buffer.tobytes())
            except OSError as error:
                self._to[peer].close()  # the frame may be incomplete: no other can follow it
                lost = self._lost.get(peer, PeerLost(str(error), peer=peer))
                raise TimeoutError() if isinstance(error, TimeoutError) else lost from error

    def recv(self, buffer: np.ndarray, peer: int, *, tag: int, deadline: float) -> None:
        """Wait for the first message with this tag, and copy it to the buffer."""
        with self._changed:
            while (found := next((m for m in self._received[peer] if m[0] == tag), None)) is None:
                if peer in self._lost or not self._changed.wait(deadline - time.monotonic()):
                    raise self._lost.get(peer, TimeoutError(f"nothing came from rank {peer}"))
            self._received[peer].remove(found)
            self._changed.notify_all()  # the reading thread has room for another message
        buffer.view(np.uint8)[...] = np.frombuffer(found[1], np.uint8)

    def close(self) -> None:
        """Wake blocked calls and close the pipes, which other ranks notice; `abort` does too."""
        with self._changed:
            self._lost = dict.fromkeys(self._to, GroupClosed("the group has ended")) | self._lost
            self._changed.notify_all()
        for peer, pipe in self._to.items():
            with suppress(OSError):  # it may be closed already
                pipe.shutdown(SHUT_RDWR)  # wakes a thread that is sending
            with self._send_locks[peer]:
                pipe.close()

    def _read(self, pipe: socket, _address: str) -> None:
        """Read messages from a pipe until it ends."""
        with pipe, pipe.makefile("rb") as stream, suppress(struct.error):  # an incomplete frame
            peer, _ = _HEADER.unpack(stream.read(_HEADER.size))
            for tag, size in map(_HEADER.unpack, iter(lambda: stream.read(_HEADER.size), b"")):
                [message] = struct.unpack(f"{size}s", stream.read(size))
                with self._changed:
                    (queue := self._received[peer]).append((tag, message))
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: len(queue) < _MAX_QUEUED or peer in self._lost)
        with self._changed:
            self._lost.setdefault(peer, PeerLost("it has closed its pipe", peer=peer))
            self._changed.notify_all()
