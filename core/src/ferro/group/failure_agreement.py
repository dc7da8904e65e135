"""What all ranks of a group learn about its death: one cause, told the same on every rank.

The first rank that fails claims the certificate in the store, writes down the cause and aborts
the backend, which wakes the others. Whoever fails afterwards, because it was woken or because a
peer's connection closed, finds the certificate and raises the cause instead of its own symptom.

For a deadline the cause needs the others: every rank that fails first notes that it was there
and what it was doing; the claimant waits a moment for these notes before it writes the
certificate. Whoever left no note had not come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ferro.collectives.label import Call
from ferro.errors import CollectiveMismatch, CollectiveTimeout, FerroError, GroupClosed, PeerLost, RendezvousError
from ferro.group.group_info import GroupInfo
from ferro.rendezvous import codec

_NOTES_S = 1.0  # how long the claimant of a timeout waits for the others' notes
_MOST_CHARACTERS = 8192
_SAME_CALLS = "Make every rank issue the same calls in the same order, with the same dtype, size, reduction and root"
_CERTIFICATE_S = 5.0  # how long the others wait for the certificate


@dataclass(frozen=True, slots=True)
class CallSite:
    """Where it happened: one call on this rank.

    Attributes:
        call: what was called.
        peers: the other ranks of a transfer; () for a collective, in which all take part.
        timeout_s: the seconds allowed.
        elapsed_s: the seconds gone.
    """

    call: Call
    peers: tuple[int, ...]
    timeout_s: float
    elapsed_s: float

    def place(self) -> str:
        """Return the call and its number, as ranks note it for each other."""
        return f"{self.call.op} #{self.call.seq}"

    def is_partner(self, note: str) -> bool:
        """Say whether a rank with this note was in the same operation."""
        if self.peers:  # the two ends of a transfer have names and numbers of their own
            return note.startswith(("send", "recv"))
        return note == self.place()


class FailureAgreement:
    """Agrees on the cause of a group's death through the group's store.

    Args:
        members: the group.
        rank: this rank in it.
    """

    def __init__(self, members: GroupInfo, rank: int) -> None:
        self._store = members.store.prefix("death")
        self._members = members
        self._rank = rank

    def cause(self, error: BaseException, scene: CallSite, wake: Callable[[], None]) -> FerroError:
        """Return the error that this rank raises for `error`; wake the others if it is first.

        Args:
            error: what the backend raised.
            scene: the call in which it did.
            wake: aborts the backend; called when the others may look for the certificate.
        """
        try:
            self._note(scene)
            if self._store.add("claims", 1) > 1:
                wake()
                return self._read(scene)
            return self._write(error, scene, wake)
        except Exception:  # noqa: BLE001 - the group dies, whatever its store answers
            wake()  # without a store every rank has only its own symptom to tell
            return self._symptom(error, scene)

    def aborted(self) -> None:
        """Write the certificate of a group that its user aborts on this rank."""
        self._certify("GroupClosed", "was aborted")

    def left(self) -> None:
        """Write the certificate of a group that this rank leaves in the middle of operations."""
        self._certify("PeerLost", "was left, with operations under way,")

    def _certify(self, kind: str, what: str) -> None:
        text = f"group {self._members.name!r} {what} by {self._members.who(self._rank)}"
        try:
            if self._store.add("claims", 1) == 1:
                record = {"kind": kind, "text": text, "peer": self._rank}
                self._store.set("certificate", codec.encode(record))
        except (RendezvousError, OSError):
            return  # the others will see connections close

    def _note(self, scene: CallSite) -> None:
        self._store.set(f"note/{self._rank}", scene.place().encode())

    def _note_of(self, rank: int, deadline: float) -> str:
        try:
            return self._store.get(f"note/{rank}", deadline=deadline).decode()
        except TimeoutError:
            return ""

    def _write(self, error: BaseException, scene: CallSite, wake: Callable[[], None]) -> FerroError:
        late = isinstance(error, TimeoutError)
        if late:
            wake()  # the others note that they were there
        found = self._timeout(scene) if late else self._symptom(error, scene)
        record = {
            "kind": type(found).__name__,
            "text": _writable(str(found)),
            "peer": found.peer,
            "arrived": getattr(found, "arrived", ()),
            "missing": getattr(found, "missing", ()),
        }
        self._store.set("certificate", codec.encode(record))
        if not late:
            wake()
        return found

    def _read(self, scene: CallSite) -> FerroError:
        raw = self._store.get("certificate", deadline=time.monotonic() + _CERTIFICATE_S)
        record = codec.decode(raw)
        assert isinstance(record, dict), "a certificate is a table"
        return self._rebuild(record, scene)

    def _timeout(self, scene: CallSite) -> CollectiveTimeout:
        """Ask who was there; a rank that was in another call has not arrived, and says where."""
        n = len(self._members.hosts)
        others = scene.peers or [r for r in range(n) if r != self._rank]
        arrived, missing, silent = [self._rank], [], []
        absent = []
        deadline = time.monotonic() + _NOTES_S
        for rank in others:
            note = self._note_of(rank, deadline)
            if note and scene.is_partner(note):
                arrived.append(rank)
                continue
            missing.append(rank)
            absent.append(self._members.who(rank) + (f", which was in {note}" if note else ""))
            if not note:
                silent.append(rank)
        if missing:
            told = f"arrived: {_ranks(arrived)}; did not arrive: {', '.join(absent)}"
            remedy = f"Read the log of rank {(silent or missing)[0]} first"
        else:
            told = "all ranks were there"
            remedy = "Raise timeout_s, or look for a slow or broken link"
        return CollectiveTimeout(
            f"{self._head(scene)} did not finish within {scene.timeout_s:g} s; {told}. "
            f"The group can no longer be used. {remedy}.",
            op=scene.call.op,
            group=self._members.name,
            rank=self._rank,
            seq=scene.call.seq,
            seconds=scene.timeout_s,
            peer=scene.peers[0] if scene.peers else None,
            arrived=sorted(arrived),
            missing=missing,
        )

    def _symptom(self, error: BaseException, scene: CallSite) -> FerroError:
        """Return what this rank can say by itself."""
        members, op, rank = self._members, scene.call.op, self._rank
        group, n = members.name, len(members.hosts)
        if isinstance(error, CollectiveMismatch):
            number, remedy = f" (#{scene.call.seq})", _SAME_CALLS
            if scene.peers:
                number, remedy = "", "Receive with the dtype and number of elements that are sent"
            return CollectiveMismatch(
                f"ranks made different calls on group {group!r}{number}: {error}. "
                f"The group can no longer be used. {remedy}.",
                op=op,
                group=group,
                rank=rank,
                peer=error.peer,
            )
        if isinstance(error, PeerLost) and error.peer is not None:
            return PeerLost(
                f"{self._head(scene)} failed: {members.who(error.peer)} of {n} is gone, noticed by "
                f"rank {rank} after {scene.elapsed_s:.1f} s of {scene.timeout_s:g} s "
                f"({error}). The group can no longer be used. Read rank {error.peer}'s log first; "
                "then restart the job, or go on without it through shrink().",
                op=op,
                group=group,
                rank=rank,
                peer=error.peer,
                host=members.hosts[error.peer],
            )
        if isinstance(error, TimeoutError):
            return CollectiveTimeout(
                f"{self._head(scene)} did not finish within {scene.timeout_s:g} s on rank {rank}, "
                "and the store could not be reached to ask for the others. "
                "The group can no longer be used.",
                op=op,
                group=group,
                rank=rank,
                seq=scene.call.seq,
                seconds=scene.timeout_s,
                arrived=(rank,),
            )
        return GroupClosed(
            f"{self._head(scene)} failed on rank {rank} of {n}: {type(error).__name__}: {error}. "
            "The group can no longer be used.",
            op=op,
            group=group,
            rank=rank,
        )

    def _rebuild(self, record: Mapping[str, object], scene: CallSite) -> FerroError:
        """Return the certificate's error as this rank's own."""
        text, kind = str(record["text"]), record["kind"]
        op, group, rank = scene.call.op, self._members.name, self._rank
        peer = record.get("peer")
        peer = peer if isinstance(peer, int) else None
        if kind == "CollectiveMismatch":
            return CollectiveMismatch(text, op=op, group=group, rank=rank, peer=peer)
        if kind == "PeerLost":
            host = None if peer is None else self._members.hosts[peer]
            return PeerLost(text, op=op, group=group, rank=rank, peer=peer, host=host)
        if kind == "CollectiveTimeout":
            return CollectiveTimeout(
                text,
                op=op,
                group=group,
                rank=rank,
                seq=scene.call.seq,
                seconds=scene.timeout_s,
                arrived=_numbers(record.get("arrived")),
                missing=_numbers(record.get("missing")),
            )
        return GroupClosed(text, op=op, group=group, rank=rank)

    def _head(self, scene: CallSite) -> str:
        """Return the place in words."""
        group = self._members.name
        if scene.peers:
            return f"{scene.call.op} with rank {scene.peers[0]} on group {group!r}"
        return f"{scene.place()} on group {group!r}"


def _numbers(value: object) -> list[int]:
    return [item for item in value if isinstance(item, int)] if isinstance(value, list) else []


def _ranks(ranks: Sequence[int]) -> str:
    return "rank " + ", ".join(str(rank) for rank in sorted(ranks))


def _writable(text: str) -> str:
    """Return a text as a certificate can hold it: any characters, bounded."""
    return text.encode(errors="replace").decode()[:_MOST_CHARACTERS]
