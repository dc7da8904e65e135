"""Transfers: sending and receiving through the part for the array's device, with a label where that part sends none."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from ferro import Backend, Device
from ferro.arrays import device_of
from ferro.backend import Completion
from ferro.collectives.label import LABEL_BYTES, compare_labels, transfer_call
from ferro.types import Array

from .routes import Routes

Item = tuple[int, Array]  # the peer and the buffer of one transfer


class LastLaunch(threading.local):
    """The part to which this thread last gave an operation on a device's queue."""

    _part: Backend | None = None

    def record(self, part: Backend, device: Device) -> None:
        """Record that a part was given an array on a device."""
        self._part = part if device in part.streams else None

    def completion(self) -> Completion:
        """Return the completion of the operation recorded last."""
        return _COMPLETED if self._part is None else self._part.launched()


class _Completed:
    """The completion of an operation that had ended when its method returned."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return


_COMPLETED = _Completed()


class Transfers:
    """The transfers of one rank.

    A part may send arrays without labels, so that the receiver cannot compare dtype, size and device. If `p2p` sends
    labels, a label goes through `p2p` ahead of each such array. If `p2p` sends none either, the group itself sends a
    label ahead of every array.

    Args:
        routes: the parts.
        last_launch: records the operations that are given to parts.
    """

    def __init__(self, routes: Routes, last_launch: LastLaunch) -> None:
        self._by_device = routes.transfers
        self._p2p = routes.p2p
        self._last_launch = last_launch
        self._others = [part for part in routes.parts if part is not routes.p2p]
        self._unlabelled = {part for part in self._others if routes.p2p.labels_frames and not part.labels_frames}

    def send(self, buffer: Array, peer: int, tag: int, deadline: float) -> None:
        """Send as `Backend.send` says."""
        part = self._part(buffer)
        if part in self._unlabelled:
            self._p2p.send(_label(buffer), peer, tag=tag, deadline=deadline)
        self._last_launch.record(part, device_of(buffer))
        part.send(buffer, peer, tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, tag: int, deadline: float) -> None:
        """Receive as `Backend.recv` says."""
        part = self._part(buffer)
        if part in self._unlabelled:
            label = _empty_label()
            self._p2p.recv(label, peer, tag=tag, deadline=deadline)
            self._compare(label, buffer, peer)
        self._last_launch.record(part, device_of(buffer))
        part.recv(buffer, peer, tag=tag, deadline=deadline)

    def exchange(self, sends: Sequence[Item], recvs: Sequence[Item], tag: int, deadline: float) -> None:
        """Exchange as `Backend.exchange` says: part by part, `p2p` first, in the same order on all ranks."""
        self._exchange_by_p2p(sends, recvs, tag, deadline)
        for part in self._others:
            own_sends = [item for item in sends if self._part(item[1]) is part]
            own_recvs = [item for item in recvs if self._part(item[1]) is part]
            if own_sends or own_recvs:
                part.exchange(own_sends, own_recvs, tag=tag, deadline=deadline)
        devices = {device_of(buffer) for _, buffer in (*sends, *recvs)}
        for device in devices:
            self._last_launch.record(self._by_device[device], device)
            if len(devices) > 1:  # for the group, an exchange is an operation on the source's device alone
                self._last_launch.completion().wait()

    def _exchange_by_p2p(self, sends: Sequence[Item], recvs: Sequence[Item], tag: int, deadline: float) -> None:
        """Exchange the arrays that `p2p` transfers itself, and the labels of those that unlabelled parts transfer."""
        served = {self._p2p, *self._unlabelled}
        given = [(peer, buffer) for peer, buffer in sends if self._part(buffer) in served]
        awaited = [(peer, buffer) for peer, buffer in recvs if self._part(buffer) in served]
        if not given and not awaited:
            return
        outgoing = [(peer, buffer if self._is_p2ps(buffer) else _label(buffer)) for peer, buffer in given]
        incoming = [(peer, buffer if self._is_p2ps(buffer) else _empty_label()) for peer, buffer in awaited]
        self._p2p.exchange(outgoing, incoming, tag=tag, deadline=deadline)
        for (peer, buffer), (_, received) in zip(awaited, incoming, strict=True):
            if received is not buffer:
                self._compare(received, buffer, peer)

    def _part(self, buffer: Array) -> Backend:
        return self._by_device[device_of(buffer)]

    def _is_p2ps(self, buffer: Array) -> bool:
        return self._part(buffer) is self._p2p

    def _compare(self, label: Array, buffer: Array, peer: int) -> None:
        """Compare the sender's label with the receiver's array.

        Raises:
            CollectiveMismatch: dtype, size or device differ.
        """
        compare_labels(self._p2p.rank, transfer_call(buffer), peer, label.tobytes())


def _label(buffer: Array) -> Array:
    return np.frombuffer(transfer_call(buffer).label(), np.uint8)


def _empty_label() -> Array:
    return np.empty(LABEL_BYTES, np.uint8)
