"""Handover: long messages between ranks of one host go through shared memory.

    sender                                   receiver
    puts the message into its arena
    sends where, with the message's label ─→ compares labels
                                             takes the message from there
                                          ←─ says that it has

A message that lies in an arena already (`ProcessGroup.empty`) is not copied there. As any long
message it waits for its receive; short ones, which do not, go over TCP, and so do long ones for
which the sender's arena has no room.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np

from ferro.collectives.label import transfer_call
from ferro.types import Array
from ferro_gloo.shm.arena import PLACE, Place
from ferro_gloo.shm.host import Host
from ferro_gloo.shm.pieces import get_in_blocks, landing
from ferro_gloo.tcp.backend import TcpBackend
from ferro_gloo.tcp.frame import MAX_BODY

_NOTHING = np.empty(0, np.uint8)
_TAKEN = 1 << 34  # above every user's tag, and above those of `TcpBackend` and `talk`
_TAKEN_LABEL = transfer_call(_NOTHING).label()
_NOWHERE = Place(0, 0)

Item = tuple[int, Array]


class Handover:
    """The transfers of one rank in a group.

    Args:
        flat: the group over TCP.
        host: this rank's host.
    """

    def __init__(self, flat: TcpBackend, host: Host) -> None:
        self._flat = flat
        self._host = host

    def exchange(
        self, sends: Sequence[Item], recvs: Sequence[Item], *, tag: int, deadline: float
    ) -> None:
        """See `Backend.exchange`. What can be handed over is, all at once; then the rest goes."""
        giving = [item for item in sends if self._is_handed(*item)]
        taking = [item for item in recvs if self._is_handed(*item)]
        rest_of_sends = [item for item in sends if not self._is_handed(*item)]
        rest_of_recvs = [item for item in recvs if not self._is_handed(*item)]
        if giving or taking:
            # What is in memory of its own is held until it has been taken.
            held = [self._in_arena(buffer) for _, buffer in giving]
            offers = [
                (peer, np.frombuffer(PLACE.pack(*place), np.uint8))
                for (peer, _), (place, _) in zip(giving, held, strict=True)
            ]
            told = [(peer, np.empty(PLACE.size, np.uint8)) for peer, _ in taking]
            labels = [transfer_call(buffer).label() for _, buffer in (*giving, *taking)]
            self._flat.move(offers, told, labels, tag, deadline)
            places = [Place(*PLACE.unpack(raw.data)) for _, raw in told]
            taken = [self._take(*item, place) for item, place in zip(taking, places, strict=True)]
            given = [place != _NOWHERE for place, _ in held]
            said = [(peer, _NOTHING) for (peer, _), yes in zip(taking, taken, strict=True) if yes]
            awaited = [
                (peer, _NOTHING) for (peer, _), yes in zip(giving, given, strict=True) if yes
            ]
            self._flat.move(said, awaited, repeat(_TAKEN_LABEL), tag | _TAKEN, deadline)
            rest_of_sends += [item for item, yes in zip(giving, given, strict=True) if not yes]
            rest_of_recvs += [item for item, yes in zip(taking, taken, strict=True) if not yes]
        if rest_of_sends or rest_of_recvs:
            self._flat.exchange(rest_of_sends, rest_of_recvs, tag=tag, deadline=deadline)

    def _is_handed(self, peer: int, buffer: Array) -> bool:
        """Say whether both ends find that this message is handed over."""
        return buffer.nbytes > MAX_BODY and self._host.is_neighbour(self._flat.ranks[peer])

    def _in_arena(self, buffer: Array) -> tuple[Place, Array]:
        """Return where a message is in this rank's arena, and the memory; nowhere if it is full."""
        arenas, data = self._host.arenas, buffer.view(np.uint8)
        place = arenas.place(data)
        if place is not None:
            return place, data
        memory: Array = arenas.allocate(data.size)[: data.size]
        place = arenas.place(memory)
        if place is None:
            return _NOWHERE, memory
        get_in_blocks(memory, data)
        return place, memory

    def _take(self, peer: int, buffer: Array, place: Place) -> bool:
        """Fill a buffer with a message that is at a place; say whether it is at any."""
        if place == _NOWHERE:
            return False
        data = buffer.view(np.uint8)
        _, copy = landing(data.size)
        copy(data, self._host.arenas.view(self._flat.ranks[peer], place))
        return True
