"""The handshake without a socket: who gets through, who does not, and what is ever said."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro.errors import AuthenticationError
from ferro.rendezvous.auth import handshake
from ferro.rendezvous.auth.handshake import Handshake, StrangerError, WrongSecretError

SECRET = b"a job's secret"


def deliver(to: Handshake, data: bytes, piece: int = 1 << 10) -> bytes:
    """Feed `data` in pieces as a socket would bring them; what is not wanted stays unread."""
    reply = b""
    while data and to.wants:
        size = min(piece, to.wants)
        reply += to.feed(data[:size])
        data = data[size:]
    return reply


def challenged(client: Handshake, server: Handshake) -> bytes:
    """The client's proof, after messages 1 and 2."""
    return deliver(client, deliver(server, client.opening))


@given(piece=st.integers(1, 64), purpose=st.binary(max_size=20))
@settings(deadline=None)
def test_both_ends_finish_however_the_bytes_arrive(piece, purpose):
    client = Handshake(handshake.client(SECRET, purpose))
    server = Handshake(handshake.server(SECRET, purpose))
    assert server.opening == b""
    challenge = deliver(server, client.opening, piece)
    proof = deliver(client, challenge, piece)
    verdict = deliver(server, proof, piece)
    assert server.wants == 0
    assert deliver(client, verdict, piece) == b""
    assert client.wants == 0
    sizes = [len(message) for message in (client.opening, challenge, proof, verdict)]
    assert sizes == [40, 40, 32, 32]


def test_the_server_says_nothing_before_a_whole_hello():
    server = Handshake(handshake.server(SECRET, b"store"))
    hello = Handshake(handshake.client(SECRET, b"store")).opening
    assert [server.feed(hello[i : i + 1]) for i in range(39)] == [b""] * 39
    assert len(server.feed(hello[39:])) == 40


@pytest.mark.parametrize(("secret", "purpose"), [(b"another", b"store"), (SECRET, b"mesh"), (SECRET + b"\0", b"store")])
def test_another_secret_or_purpose_is_refused_and_learns_no_proof(secret, purpose):
    client = Handshake(handshake.client(secret, purpose))
    server = Handshake(handshake.server(SECRET, b"store"))
    proof = challenged(client, server)
    with pytest.raises(WrongSecretError) as refusal:
        deliver(server, proof)
    assert refusal.value.reply == bytes(32)
    with pytest.raises(WrongSecretError, match="refused our secret"):
        deliver(client, refusal.value.reply)


def test_secret_and_purpose_do_not_run_into_each_other():
    client = Handshake(handshake.client(b"ab", b"c"))
    server = Handshake(handshake.server(b"a", b"bc"))
    with pytest.raises(WrongSecretError):
        deliver(server, challenged(client, server))


def test_a_server_without_the_secret_is_noticed():
    client = Handshake(handshake.client(SECRET, b"store"))
    challenged(client, Handshake(handshake.server(b"another", b"store")))
    with pytest.raises(WrongSecretError, match="could not prove"):
        deliver(client, b"\1" * 32)


def test_a_proof_reflected_to_the_client_is_worth_nothing():
    client = Handshake(handshake.client(SECRET, b"store"))
    preamble = Handshake(handshake.server(SECRET, b"store"))
    challenge = deliver(preamble, client.opening)[:8] + client.opening[8:]  # its own nonce
    proof = deliver(client, challenge)
    with pytest.raises(WrongSecretError):
        deliver(client, proof)


def test_a_proof_from_one_connection_does_not_fit_another():
    recorded = challenged(
        Handshake(handshake.client(SECRET, b"store")), first := Handshake(handshake.server(SECRET, b"store"))
    )
    deliver(first, recorded)
    assert first.wants == 0
    second = Handshake(handshake.server(SECRET, b"store"))
    deliver(second, Handshake(handshake.client(SECRET, b"store")).opening)
    with pytest.raises(WrongSecretError):
        deliver(second, recorded)


@pytest.mark.parametrize("noise", [b"GET / HT", bytes(8), b"\xff" * 8, b"\xf3FERROS\1"])
def test_a_stranger_is_known_by_its_first_eight_bytes(noise):
    server = Handshake(handshake.server(SECRET, b"store"))
    assert server.wants == 8
    with pytest.raises(StrangerError) as error:
        server.feed(noise)
    assert error.value.reply == b""


def test_a_foreign_service_is_known_by_its_first_eight_bytes():
    client = Handshake(handshake.client(SECRET, b"store"))
    with pytest.raises(StrangerError, match=r"not ferro.*HTTP/1\.1"):
        client.feed(b"HTTP/1.1")


def test_another_version_is_named_to_the_client(monkeypatch):
    client = Handshake(handshake.client(SECRET, b"store"))
    monkeypatch.setattr(handshake, "_CLIENT_PREAMBLE", b"\xf3FERROC\2")
    monkeypatch.setattr(handshake, "_SERVER_PREAMBLE", b"\xf3FERROS\2")
    server = Handshake(handshake.server(SECRET, b"store"))
    with pytest.raises(StrangerError, match="version 1") as error:
        deliver(server, client.opening)
    monkeypatch.undo()
    with pytest.raises(StrangerError, match=r"version 2 .* we speak 1"):
        deliver(client, error.value.reply)


def test_an_empty_secret_is_no_secret():
    with pytest.raises(AuthenticationError, match="FERRO_SECRET"):
        handshake.require_secret(b"")
