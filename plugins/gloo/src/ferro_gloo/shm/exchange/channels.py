"""Channels: the memory through which one message goes from its sender to its receiver, step after step.

A channel lies in memory of its sender, and all ranks of the host map it:

    | byte   0  int64 taken    how many blocks the receiver has read, which it stores
    | byte   8  int64 closed   1 when the receiver uses this channel no more, which it stores
    | byte  64  int64 starved  1 while the sender may sleep until blocks are taken, which it stores
    | byte 128  slots, each of whole 128 bytes:
    |               int64 number   one more than the number of the block in the slot, stored last
    |               data           the block

A message is cut into blocks, which are numbered on from step to step, and use the slots in turn. The sender writes
block b when the receiver has taken block b - slots. So it may run ahead by some steps, and overwrites nothing unread.

A long message is not copied: the receiver reads it where it is, and the sender's step ends when the receiver has read
it. From `DIRECT_BYTES` on that is a message in the sender's arena (`group.empty`); from `REMOTE_BYTES` on any, where
the system lets one process read another's memory.
"""

from __future__ import annotations

from dataclasses import dataclass

HEADER_BYTES = 128
CLOSED_AT = 8
STARVED_AT = 64
NUMBER_BYTES = 8
_ALIGNMENT = 128  # some processors fetch two cache lines at a time
DIRECT_BYTES = 16 << 10
REMOTE_BYTES = 128 << 10
# Small messages have more slots, so that the sender seldom looks how many the receiver has taken.
_SMALL_BYTES = 16 << 10
_WHOLE_BYTES = 256 << 10
_BLOCK_BYTES = 128 << 10


@dataclass(frozen=True, slots=True)
class ChannelLayout:
    """The blocks and slots of a channel; sender and receiver compute the same.

    Attributes:
        block: bytes of a block, at least 1.
        slots: a power of two.
        direct: True if the receiver reads the message where it is.
    """

    block: int
    slots: int
    direct: bool

    @classmethod
    def of(cls, nbytes: int, *, direct: bool) -> ChannelLayout:
        """Choose the layout for messages of this size."""
        if direct:
            return cls(max(1, nbytes), 2, True)
        if nbytes <= _SMALL_BYTES:
            return cls(max(1, nbytes), 4, False)
        if nbytes <= _WHOLE_BYTES:
            return cls(nbytes, 2, False)
        return cls(_BLOCK_BYTES, 8, False)

    @property
    def stride(self) -> int:
        """Bytes from one slot to the next."""
        data = 0 if self.direct else self.block
        return -(-(NUMBER_BYTES + data) // _ALIGNMENT) * _ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Size of the channel."""
        return HEADER_BYTES + self.slots * self.stride

    def blocks(self, nbytes: int) -> int:
        """Count the blocks of a message of this size; an empty one has one, too."""
        return max(1, -(-nbytes // self.block))

    def needs_receiver(self, nbytes: int) -> bool:
        """Return True if a sender's step may not end before its receiver's begins."""
        return self.direct or 2 * self.blocks(nbytes) > self.slots
