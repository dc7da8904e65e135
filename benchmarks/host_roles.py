"""The programs that `hosts.py` runs on each host: a plain socket's end, or an all_reduce's rank.

python host_roles.py stream ADDRESS PORT BYTES listen|connect
python host_roles.py all_reduce hierarchical|flat BYTES CALLS      (under `ferro run`)
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

import numpy as np

import ferro

_CHUNK_BYTES = 1 << 20
_BUFFER_BYTES = 4 << 20  # the size that the gloo plugin sets
_TIMEOUT_S = 30.0


def stream(address: str, port: str, nbytes: str, end: str) -> None:
    """Send and receive `nbytes` at the same time, and print the seconds."""
    with (_listen if end == "listen" else _connect)(address, int(port)) as sock:
        sock.settimeout(_TIMEOUT_S)
        sock.sendall(b"!")
        sock.recv(1)
        began = time.perf_counter()
        sending = threading.Thread(target=_send, args=(sock, int(nbytes)))
        sending.start()
        _receive(sock, int(nbytes))
        seconds = time.perf_counter() - began
        sending.join()
    print(seconds)


def _listen(address: str, port: int) -> socket.socket:
    with socket.create_server((address, port)) as server:
        server.settimeout(_TIMEOUT_S)
        return _set_buffer_sizes(server.accept()[0])


def _connect(address: str, port: int) -> socket.socket:
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return _set_buffer_sizes(socket.create_connection((address, port), _TIMEOUT_S))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _set_buffer_sizes(sock: socket.socket) -> socket.socket:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    return sock


def _send(sock: socket.socket, nbytes: int) -> None:
    data = memoryview(bytes(_CHUNK_BYTES))
    for start in range(0, nbytes, _CHUNK_BYTES):
        sock.sendall(data[: nbytes - start])


def _receive(sock: socket.socket, nbytes: int) -> None:
    memory = bytearray(_CHUNK_BYTES)
    while nbytes > 0:
        count = sock.recv_into(memory)
        if count == 0:
            raise ConnectionResetError("the other end is gone")
        nbytes -= count


def all_reduce(algorithm: str, nbytes: str, calls: str) -> None:
    """Time calls in place and check their results; rank 0 prints the slowest rank's seconds."""
    options = {"shared_memory": algorithm == "hierarchical"}
    with ferro.init("gloo", backend_options=options) as group:
        array = np.empty(int(nbytes) // 4, np.float32)
        seconds = []
        for _ in range(int(calls) + 1):
            array[...] = group.rank + 1
            group.barrier()
            began = time.perf_counter()
            group.all_reduce(array, out=array)
            seconds.append(time.perf_counter() - began)
            if not (array == sum(range(1, group.world_size + 1))).all():
                raise ArithmeticError(f"wrong result on rank {group.rank}")
        slowest = group.all_reduce(np.array(seconds[1:]), "max")  # the first call is a warm-up
        if group.rank == 0:
            print(f"seconds: {json.dumps(slowest.tolist())}")


if __name__ == "__main__":
    {"stream": stream, "all_reduce": all_reduce}[sys.argv[1]](*sys.argv[2:])
