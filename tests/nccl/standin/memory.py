"""Memory with addresses, which can be used only while it is allocated."""

from __future__ import annotations

import threading
from bisect import bisect_right, insort

import numpy as np

HOST = -1  # the device of pinned memory


class Memory:
    """All memory of a machine, by address."""

    def __init__(self):
        self._lock = threading.Lock()
        self._starts = []
        self._blocks = {}

    def allocate(self, nbytes, device, free):
        data = np.full(max(1, nbytes), 0xA5, np.uint8)  # garbage, as GPU memory is
        block = Block(self, data, device, free)
        with self._lock:
            insort(self._starts, block.start)
            self._blocks[block.start] = (data, device)
        return block

    def remove(self, start):
        with self._lock:
            data, _ = self._blocks.pop(start)
            self._starts.remove(start)
        data[...] = 0x5A

    def view(self, address, nbytes, devices):
        """Return the bytes at an address; an error says what is wrong with it."""
        with self._lock:
            at = bisect_right(self._starts, address) - 1
            start = self._starts[at] if at >= 0 else None
            data, device = self._blocks.get(start, (None, None))
        if data is None or address + nbytes > start + data.size:
            raise MemoryError(f"{nbytes} bytes at {address:#x} are not allocated (any more)")
        if device not in devices:
            raise MemoryError(f"memory of device {device} used where {devices} is wanted")
        return data[address - start : address - start + nbytes]


class Block:
    """An allocation; freed, in its stream's order, when nobody refers to it any more."""

    def __init__(self, memory, data, device, free):
        self._memory = memory
        self._free = free
        self.data = data
        self.device = device
        self.start = data.__array_interface__["data"][0]

    def __del__(self):
        memory, start = self._memory, self.start
        self._free(lambda: memory.remove(start))
