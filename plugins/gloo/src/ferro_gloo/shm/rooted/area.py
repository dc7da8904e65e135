"""Areas: the memory through which the data of a persistent rooted collective goes, step after step.

An area lies in memory of the root, and all ranks of the host map it:

    | a counter of every rank, of 128 bytes:
    |     byte  0  int64 value      how many steps the rank has written, or has read (it tells that now and then)
    |     byte  8  uint32 sleepers  see `counters`
    |     byte 16  int64 deferred   1 while the rank has started a step that it could not write yet
    |     byte 24  int64 closed     1 when the rank uses the area no more
    | slots of every writer, of whole 128 bytes:
    |     byte  0  int64 step       one more than the number of the step in the slot, stored last
    |     byte  8  int64 order      how many collectives the writer had issued on the group before this step
    |     byte 16  data

In a broadcast or scatter the root writes, once for all; in a reduce or gather all other ranks write, each for the root.
A writer writes step s into slot s % depth when all its readers have read step s - depth. So no rank waits for another
one but for its data, or because that one is `depth` steps behind.
"""

from __future__ import annotations

COUNTER_BYTES = 128
# Where `closed` would be in a header as `ExchangeMemory` reads them, counted from a rank's counter.
CLOSABLE_AT = 16
# Slots of a writer, for data of at most so many bytes, of all ranks in a scatter. Measured, 8 ranks on 2 busy cores:
# in a stream of 60 a broadcast of 4 bytes takes 250 us with 32 slots, 20 with 128; with 2 ranks it makes no difference.
_DEPTHS = ((256, 128), (4 << 10, 32), (16 << 10, 16), (64 << 10, 8))


def depth_for(nbytes: int) -> int:
    """Choose the number of slots for data of this size; 0 where running ahead does not pay."""
    return next((depth for limit, depth in _DEPTHS if nbytes <= limit), 0)
