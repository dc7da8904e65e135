"""Transfers: every array through the part that takes it, with a label where that shows none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro import Backend
from ferro.arrays import device_of
from ferro.collectives.label import LABEL_BYTES, compare_labels, transfer_call
from ferro.types import Array

from .launches import Launches
from .routes import Routes

Item = tuple[int, Array]


class Transfers:
    """The transfers of one rank.

    A part may move arrays without showing what they are, where `p2p` does show it. Then a label
    goes ahead of each through `p2p`, so that ends which differ in dtype, size or device learn of
    it. Where `p2p` shows nothing either, the group sends a label ahead of every array itself.

    Args:
        routes: the parts.
        launches: told what is given to whom.
    """

    def __init__(self, routes: Routes, launches: Launches) -> None:
        self._by_device = routes.transfers
        self._p2p = routes.p2p
        self._launches = launches
        others = [part for part in routes.parts if part is not routes.p2p]
        shows = routes.p2p.labels_frames
        self._others = others
        self._unlabelled = {part for part in others if shows and not part.labels_frames}

    def send(self, buffer: Array, peer: int, tag: int, deadline: float) -> None:
        """See `Backend.send`."""
        mover = self._mover(buffer)
        if mover in self._unlabelled:
            self._p2p.send(_label(buffer), peer, tag=tag, deadline=deadline)
        self._launches.note(mover, device_of(buffer))
        mover.send(buffer, peer, tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, tag: int, deadline: float) -> None:
        """See `Backend.recv`."""
        mover = self._mover(buffer)
        if mover in self._unlabelled:
            label = _blank()
            self._p2p.recv(label, peer, tag=tag, deadline=deadline)
            self._compare(label, buffer, peer)
        self._launches.note(mover, device_of(buffer))
        mover.recv(buffer, peer, tag=tag, deadline=deadline)

    def exchange(self, sends: Sequence[Item], recvs: Sequence[Item], tag: int, deadline: float) -> None:
        """See `Backend.exchange`. Part by part, `p2p` first: in the same order on all ranks."""
        self._exchange_ahead(sends, recvs, tag, deadline)
        for part in self._others:
            own_sends = [item for item in sends if self._mover(item[1]) is part]
            own_recvs = [item for item in recvs if self._mover(item[1]) is part]
            if own_sends or own_recvs:
                part.exchange(own_sends, own_recvs, tag=tag, deadline=deadline)
        devices = {device_of(buffer) for _, buffer in (*sends, *recvs)}
        for device in devices:
            self._launches.note(self._by_device[device], device)
            if len(devices) > 1:  # the group takes it for an operation on the source's device
                self._launches.completion().wait()

    def _exchange_ahead(self, sends: Sequence[Item], recvs: Sequence[Item], tag: int, deadline: float) -> None:
        """Exchange what goes through `p2p`: its own arrays, and labels in place of others."""
        ahead = {self._p2p, *self._unlabelled}
        given = [(peer, x) for peer, x in sends if self._mover(x) in ahead]
        awaited = [(peer, x) for peer, x in recvs if self._mover(x) in ahead]
        if not given and not awaited:
            return
        outgoing = [(peer, x if self._is_p2ps(x) else _label(x)) for peer, x in given]
        incoming = [(peer, x if self._is_p2ps(x) else _blank()) for peer, x in awaited]
        self._p2p.exchange(outgoing, incoming, tag=tag, deadline=deadline)
        for (peer, buffer), (_, came) in zip(awaited, incoming, strict=True):
            if came is not buffer:
                self._compare(came, buffer, peer)

    def _mover(self, buffer: Array) -> Backend:
        return self._by_device[device_of(buffer)]

    def _is_p2ps(self, buffer: Array) -> bool:
        return self._mover(buffer) is self._p2p

    def _compare(self, label: Array, buffer: Array, peer: int) -> None:
        """Hold the sender's label against the receiver's array.

        Raises:
            CollectiveMismatch: they differ.
        """
        compare_labels(self._p2p.rank, transfer_call(buffer), peer, label.tobytes())


def _label(buffer: Array) -> Array:
    return np.frombuffer(transfer_call(buffer).label(), np.uint8)


def _blank() -> Array:
    return np.empty(LABEL_BYTES, np.uint8)
