"""StageChannel: packs and unpacks the messages from a stage's rank to the rank of a neighbouring stage.

An array and its header go in one message, because each message costs time: it wakes two threads, which share their
cores with the threads that compute. But the receiver must know the size of a message beforehand. So sender and receiver
both derive it from the sizes of the arrays sent before: a message has room for an array as large as those. A larger
array, or one on a GPU, is sent as a second message:

    arrays      24 bytes              24 bytes             20 bytes             30 bytes
    messages    header, capacity 0    header, capacity 24  header, capacity 24  header, capacity 24
                the array                                                       the array

Once the capacity has stayed the same during a whole pass, both ends make persistent operations for messages of that
capacity (see `repeated_messages`). Each header tells whether the next message comes through them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ferro import ProcessGroup

from ...nn.arrays import Array
from .header import HEADER_BYTES, ArrayHeader, decode, encode
from .plan import PipelineCall
from .repeated_messages import MOST_MESSAGE_BYTES, RepeatedMessages, RepeatedSend, make_repeated_messages

_MOST_CAPACITY = MOST_MESSAGE_BYTES - HEADER_BYTES


@dataclass(slots=True)
class StageChannel:
    """One end of the channel of an edge (see `plan.Edge`).

    Attributes:
        group: the group of two ranks, the sender and the receiver.
        pipeline: name of the group of all of the pipeline's ranks, for error messages.
        capacity: the largest array, in bytes, that fits into the next ordinary message; the same at both ends.
        capacity_before: the capacity when the last pass began; None before the first pass.
        repeated: the persistent operations, if there are any.
        next_is_repeated: True if the next message goes through them; the same at both ends.
        may_repeat: False once it is known that the backend has none that are better than ordinary messages.
    """

    group: ProcessGroup
    pipeline: str
    capacity: int = 0
    capacity_before: int | None = None
    repeated: RepeatedMessages | None = None
    next_is_repeated: bool = False
    may_repeat: bool = True

    @property
    def room(self) -> int:
        """The largest array, in bytes, that fits into the next message."""
        if self.next_is_repeated and self.repeated is not None:
            return self.repeated.nbytes - HEADER_BYTES
        return self.capacity

    def begin_pass(self, messages: int) -> None:
        """Make persistent operations if they pay from now on; both ends call it between passes, as a collective.

        Args:
            messages: how many are sent in a training pass.
        """
        is_settled = self.capacity == self.capacity_before
        self.capacity_before = self.capacity
        if not (is_settled and self.may_repeat and 0 < self.capacity <= _MOST_CAPACITY) or self._suits_repeated():
            return
        if self.repeated is not None:
            self.repeated.close()
        self.repeated = make_repeated_messages(self.group, self.capacity + HEADER_BYTES, messages)
        self.next_is_repeated = self.may_repeat = self.repeated is not None

    def empty(self) -> Array:
        """Return memory for an ordinary message, (capacity + HEADER_BYTES,) uint8."""
        return np.empty(self.capacity + HEADER_BYTES, np.uint8)

    def pack(self, call: PipelineCall, header: ArrayHeader | None, array: Array | None) -> Array | RepeatedSend:
        """Return the next message, or the operation that sends it: a header, and the array if it fits.

        Args:
            call: the call that this rank executes.
            header: describes the array; None tells the receiver that no more will come.
            array: the array.
        """
        repeated = self.repeated
        send = repeated.turn if repeated is not None and self.next_is_repeated else None
        message = self.empty() if send is None else send.memory
        if header is not None and array is not None and self.fits(header):
            _array_in(message, header)[...] = array
        goes_on = repeated is not None and self._suits_repeated() and repeated.is_free(0 if send is None else 1)
        message[-HEADER_BYTES:] = encode(call, header, next_is_repeated=goes_on)
        # Nothing has changed where an exception came: a stop message takes the place of this one.
        self.next_is_repeated = goes_on
        if repeated is None or send is None:
            return message
        repeated.pass_turn()
        return send

    def unpack(self, message: Array) -> tuple[PipelineCall, ArrayHeader | None, Array | None]:
        """Return the sender's call, the header (None if it has stopped), and the array if it fits.

        Raises:
            CollectiveMismatch: no StageChannel has packed this message.
        """
        call, header, goes_on = decode(message[-HEADER_BYTES:])
        array = None
        if header is not None and self.fits(header):
            array = _array_in(message, header)
            # The next message overwrites a repeated one; and a view would keep a message that is much larger.
            if self.next_is_repeated or 2 * header.nbytes < self.capacity:
                array = array.copy()
        self.next_is_repeated = goes_on
        return call, header, array

    def fits(self, header: ArrayHeader) -> bool:
        """Return True if the array fits into the next message, before its header."""
        return not header.on_gpu and header.nbytes <= self.room

    def adapt_capacity(self, header: ArrayHeader) -> None:
        """Adapt the capacity to the last array: raise it to its size, or halve it if more than half was unused."""
        needed = 0 if header.on_gpu else header.nbytes
        kept = self.capacity if 2 * needed >= self.capacity else self.capacity // 2
        self.capacity = max(needed, kept)

    def _suits_repeated(self) -> bool:
        """Return True if the persistent operations have room for the arrays that are sent now, but not much more."""
        if self.repeated is None:
            return False
        return self.capacity <= self.repeated.nbytes - HEADER_BYTES <= 2 * self.capacity


def _array_in(message: Array, header: ArrayHeader) -> Array:
    """Return a view of the array in a message: at its front, where memory is aligned."""
    return message[: header.nbytes].view(header.dtype).reshape(header.shape)
