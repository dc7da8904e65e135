"""A rank's connection to the driver: authenticated both ways, then JSON messages.

The handshake repeats the client's side of `ferro.rendezvous.auth.handshake` for environments that
have no ferro: this rank sends preamble and nonce, then its proof; the server answers each in kind.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
from typing import Any

PURPOSE = b"bench"
MAX_MESSAGE_BYTES = 1 << 20
LENGTH = struct.Struct("!I")

_CLIENT = b"\xf3FERROC\x01"
_SERVER = b"\xf3FERROS\x01"
_NONCE_BYTES = _PROOF_BYTES = 32
_HANDSHAKE_S = 20.0
# Between two orders other worlds have their turns, each within the driver's own deadline.
_ORDER_S = 1800.0


class Channel:
    """The connection to the driver, which ends when either process does."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        """Connect and authenticate.

        Raises:
            ConnectionError: the other end is not the driver, or is gone.
            TimeoutError: it does not answer.
        """
        self._sock = socket.create_connection((host, port), timeout=_HANDSHAKE_S)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._authenticate(secret)
        except BaseException:
            self._sock.close()
            raise
        self._sock.settimeout(_ORDER_S)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message.

        Raises:
            ConnectionError: the driver has left.
        """
        self._sock.sendall(encode(message))

    def receive(self) -> dict[str, Any]:
        """Wait for a message.

        Raises:
            ConnectionError: the driver has left.
            TimeoutError: it sent nothing for half an hour.
        """
        (size,) = LENGTH.unpack(self._exactly(LENGTH.size))
        if size > MAX_MESSAGE_BYTES:
            raise ConnectionError(f"the driver announced a message of {size} bytes")
        message: dict[str, Any] = json.loads(self._exactly(size))
        return message

    def _authenticate(self, secret: bytes) -> None:
        ours = secrets.token_bytes(_NONCE_BYTES)
        self._sock.sendall(_CLIENT + ours)
        answer = self._exactly(len(_SERVER) + _NONCE_BYTES)
        nonces = ours + answer[len(_SERVER) :]
        self._sock.sendall(_proof(secret, _CLIENT, nonces))
        verdict = self._exactly(_PROOF_BYTES)
        if not hmac.compare_digest(verdict, _proof(secret, _SERVER, nonces)):
            raise ConnectionError("what listens at the driver's address does not hold its secret")

    def _exactly(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            data = self._sock.recv(size - len(received))
            if not data:
                raise ConnectionError("the driver closed the connection")
            received += data
        return bytes(received)


def encode(message: dict[str, Any]) -> bytes:
    """Return a message as it is sent: its length, then JSON."""
    body = json.dumps(message).encode()
    return LENGTH.pack(len(body)) + body


def _proof(secret: bytes, preamble: bytes, nonces: bytes) -> bytes:
    key = hashlib.sha256(secret).digest()
    return hmac.new(key, preamble + nonces + PURPOSE, hashlib.sha256).digest()
