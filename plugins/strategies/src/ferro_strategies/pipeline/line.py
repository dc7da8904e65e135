"""Line: one end of a route, and the messages that go along it, pass after pass.

An array and its header go in one message, for each message takes its time: two threads are woken
on its way, which share their cores with those that compute. But who receives must know how long
a message is. So both ends remember the arrays that went before, and each message has room for
another as large; an array that needs more, or is on a GPU, follows by itself:

    arrays      24 bytes             24 bytes        20 bytes        30 bytes
    messages    header, room 0       header, room 24 header, room 24 header, room 24
                the array by itself                                  the array by itself
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ferro import ProcessGroup

from ..nn.arrays import Array
from .call import Call
from .header import HEADER_BYTES, Header, decode, encode


@dataclass(slots=True)
class Line:
    """One end of a route.

    Attributes:
        group: the sender and the receiver.
        pipeline: name of the group of all of the pipeline's ranks, for messages.
        room: how many bytes of array the next message has room for; the same at both ends.
    """

    group: ProcessGroup
    pipeline: str
    room: int = 0

    def empty(self) -> Array:
        """Return memory for the next message, (room + HEADER_BYTES,) uint8."""
        return np.empty(self.room + HEADER_BYTES, np.uint8)

    def packed(self, call: Call, header: Header, array: Array) -> Array:
        """Return the next message: a header, and its array if there is room."""
        message = self.empty()
        message[self.room :] = encode(call, header)
        if self.fits(header):
            _inside(message, header)[...] = array
        return message

    def last_word(self, call: Call) -> Array:
        """Return the message that nothing more will come."""
        message = self.empty()
        message[self.room :] = encode(call, None)
        return message

    def unpacked(self, message: Array) -> tuple[Call, Header | None, Array | None]:
        """Return a message's call, its header, None in the last word, and the array if there.

        Raises:
            CollectiveMismatch: it is no message of ours.
        """
        call, header = decode(message[self.room :])
        if header is None or not self.fits(header):
            return call, header, None
        array = _inside(message, header)
        # A little array is not to keep a large message.
        return call, header, array.copy() if 2 * header.nbytes < self.room else array

    def fits(self, header: Header) -> bool:
        """Say whether the next message has room for an array."""
        return not header.on_gpu and header.nbytes <= self.room

    def note(self, header: Header) -> None:
        """Make room for arrays like this one, in the next message; give up what it left empty."""
        needed = 0 if header.on_gpu else header.nbytes
        self.room = max(needed, self.room if 2 * needed >= self.room else self.room // 2)


def _inside(message: Array, header: Header) -> Array:
    """Return the memory of a message's array: in front, where memory is aligned."""
    return message[: header.nbytes].view(header.dtype).reshape(header.shape)
