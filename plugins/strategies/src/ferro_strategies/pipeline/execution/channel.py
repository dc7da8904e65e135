"""StageChannel: packs and unpacks the messages from a stage's rank to the rank of a neighbouring stage.

An array and its header go in one message, because each message costs time: it wakes two threads, which share their
cores with the threads that compute. But the receiver must know the size of a message beforehand. So sender and receiver
both derive it from the sizes of the arrays sent before: a message has room for an array as large as those. A larger
array, or one on a GPU, is sent as a second message:

    arrays      24 bytes              24 bytes             20 bytes             30 bytes
    messages    header, capacity 0    header, capacity 24  header, capacity 24  header, capacity 24
                the array                                                       the array
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ferro import ProcessGroup

from ...nn.arrays import Array
from .header import HEADER_BYTES, ArrayHeader, decode, encode
from .plan import PipelineCall


@dataclass(slots=True)
class StageChannel:
    """One end of the channel of an edge (see `plan.Edge`).

    Attributes:
        group: the group of two ranks, the sender and the receiver.
        pipeline: name of the group of all of the pipeline's ranks, for error messages.
        capacity: the largest array, in bytes, that fits into the next message; the same at both ends.
    """

    group: ProcessGroup
    pipeline: str
    capacity: int = 0

    def empty(self) -> Array:
        """Return memory for the next message, (capacity + HEADER_BYTES,) uint8."""
        return np.empty(self.capacity + HEADER_BYTES, np.uint8)

    def pack(self, call: PipelineCall, header: ArrayHeader, array: Array) -> Array:
        """Return the next message: a header, and the array if it fits."""
        message = self.empty()
        message[self.capacity :] = encode(call, header)
        if self.fits(header):
            _array_in(message, header)[...] = array
        return message

    def pack_stop(self, call: PipelineCall) -> Array:
        """Return a message that tells the receiver that no more will come."""
        message = self.empty()
        message[self.capacity :] = encode(call, None)
        return message

    def unpack(self, message: Array) -> tuple[PipelineCall, ArrayHeader | None, Array | None]:
        """Return the sender's call, the header (None if it has stopped), and the array if it fits.

        Raises:
            CollectiveMismatch: no StageChannel has packed this message.
        """
        call, header = decode(message[self.capacity :])
        if header is None or not self.fits(header):
            return call, header, None
        array = _array_in(message, header)
        # A view would keep the whole message alive, so a much smaller array is copied.
        return call, header, array.copy() if 2 * header.nbytes < self.capacity else array

    def fits(self, header: ArrayHeader) -> bool:
        """Return True if the array fits into the next message, behind its header."""
        return not header.on_gpu and header.nbytes <= self.capacity

    def adapt_capacity(self, header: ArrayHeader) -> None:
        """Adapt the capacity to the last array: raise it to its size, or halve it if more than half was unused."""
        needed = 0 if header.on_gpu else header.nbytes
        kept = self.capacity if 2 * needed >= self.capacity else self.capacity // 2
        self.capacity = max(needed, kept)


def _array_in(message: Array, header: ArrayHeader) -> Array:
    """Return a view of the array in a message: at its front, where memory is aligned."""
    return message[: header.nbytes].view(header.dtype).reshape(header.shape)
