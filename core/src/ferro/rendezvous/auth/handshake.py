r"""Mutual authentication by a shared secret, as a state machine for each side, without a socket.

Four messages of fixed size are exchanged before anything else is read on a connection:

    1. client -> server   b"\xf3FERROC" version   client nonce       8 + 32 bytes
    2. server -> client   b"\xf3FERROS" version   server nonce       8 + 32 bytes
    3. client -> server   client proof                              32 bytes
    4. server -> client   server proof, or 32 zeros: refused        32 bytes

    proof = HMAC-SHA256(SHA256(secret), prover's preamble (8 bytes) | client nonce | server nonce | purpose)

The first eight bytes expose a foreign client (a browser, torch's TCPStore, noise). The nonces are fresh, so a recorded
handshake is worth nothing later; the prover's preamble in the proof prevents reflecting it to its sender; the purpose
prevents splicing a connection to one service into another. The client proves first, so a server shows no proof to a
client that does not hold the secret.

The handshake authenticates the ends of a connection. It does not encrypt what follows: on a network where others can
change packets, run the job inside a VPN or an SSH tunnel.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Generator

from ferro.errors import AuthenticationError

VERSION = 1
PREAMBLE_BYTES = 8
NONCE_BYTES = 32
PROOF_BYTES = 32

_CLIENT_MAGIC = b"\xf3FERROC"
_SERVER_MAGIC = b"\xf3FERROS"
_CLIENT_PREAMBLE = _CLIENT_MAGIC + bytes([VERSION])
_SERVER_PREAMBLE = _SERVER_MAGIC + bytes([VERSION])
_REFUSED = bytes(PROOF_BYTES)


class HandshakeError(Exception):
    """This handshake failed; `reply` should still be sent before the connection is closed."""

    def __init__(self, reason: str, reply: bytes = b"") -> None:
        super().__init__(reason)
        self.reply = reply


class StrangerError(HandshakeError):
    """The other end does not speak this protocol, or another version of it."""


class WrongSecretError(HandshakeError):
    """The other end does not hold the secret, or says that we do not."""


# A side yields the bytes to send and the number of bytes that it wants next, is sent these bytes, and returns the last
# bytes to send.
Steps = Generator[tuple[bytes, int], bytes, bytes]


class Handshake:
    """One side of one handshake: send `opening`, give `feed` the bytes that arrive, and send what it returns.

    `steps` are those of `client` or `server`. Never read more than `wants` bytes from the connection: the bytes after
    them belong to the service. `wants` is 0 when both ends are authenticated; `replies` counts the messages that `feed`
    has returned so far.
    """

    def __init__(self, steps: Steps) -> None:
        self.opening, self._size = next(steps)
        self.replies = 0
        self._steps = steps
        self._received = b""

    @property
    def wants(self) -> int:
        return self._size - len(self._received)

    def feed(self, data: bytes) -> bytes:
        """Take at most `wants` bytes; return the bytes to send now, often none, or raise HandshakeError."""
        assert len(data) <= self.wants
        self._received += data
        if self.wants:
            return b""
        message, self._received = self._received, b""
        try:
            send, self._size = self._steps.send(message)
        except StopIteration as finished:
            send, self._size = finished.value, 0
        self.replies += bool(send)
        return send


def require_secret(secret: bytes) -> None:
    """Refuse an empty secret, which everybody holds, with AuthenticationError."""
    if not secret:
        raise AuthenticationError(
            "the job's secret is empty, so nobody could be told from a stranger. Start the job with `ferro run`, "
            "which makes one, or set FERRO_SECRET to the same value on all ranks."
        )


def client(secret: bytes, purpose: bytes) -> Steps:
    ours = secrets.token_bytes(NONCE_BYTES)
    preamble = yield _CLIENT_PREAMBLE + ours, PREAMBLE_BYTES
    if not preamble.startswith(_SERVER_MAGIC):
        raise StrangerError(f"what answers there is not ferro: it began with {preamble!r}")
    if preamble != _SERVER_PREAMBLE:
        raise StrangerError(
            f"it speaks version {preamble[-1]} of ferro's handshake and we speak {VERSION}: install one ferro version "
            "everywhere"
        )
    theirs = yield b"", NONCE_BYTES
    nonces = ours + theirs
    verdict = yield _proof(secret, _CLIENT_PREAMBLE, nonces, purpose), PROOF_BYTES
    if hmac.compare_digest(verdict, _REFUSED):
        raise WrongSecretError("it refused our secret")
    if not hmac.compare_digest(verdict, _proof(secret, _SERVER_PREAMBLE, nonces, purpose)):
        raise WrongSecretError("it could not prove that it holds our secret")
    return b""


def server(secret: bytes, purpose: bytes) -> Steps:
    preamble = yield b"", PREAMBLE_BYTES
    if not preamble.startswith(_CLIENT_MAGIC):
        raise StrangerError(f"not a ferro client: it began with {preamble!r}")
    theirs = yield b"", NONCE_BYTES
    if preamble != _CLIENT_PREAMBLE:
        raise StrangerError(f"a client of handshake version {preamble[-1]}", _SERVER_PREAMBLE)
    ours = secrets.token_bytes(NONCE_BYTES)
    nonces = theirs + ours
    proof = yield _SERVER_PREAMBLE + ours, PROOF_BYTES
    if not hmac.compare_digest(proof, _proof(secret, _CLIENT_PREAMBLE, nonces, purpose)):
        raise WrongSecretError("a client with another secret or purpose", _REFUSED)
    return _proof(secret, _SERVER_PREAMBLE, nonces, purpose)


def _proof(secret: bytes, preamble: bytes, nonces: bytes, purpose: bytes) -> bytes:
    r"""Compute a proof; every part but the last has a fixed size, so no two transcripts have the same encoding.

    The secret is hashed first: HMAC pads short keys with zeros, so b"x" and b"x\0" would be the same key.
    """
    key = hashlib.sha256(secret).digest()
    return hmac.new(key, preamble + nonces + purpose, hashlib.sha256).digest()
