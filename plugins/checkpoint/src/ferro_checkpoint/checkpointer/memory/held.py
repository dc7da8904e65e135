"""HeldCheckpoint: what one rank has in its memory of one checkpoint: some ranges of its files, its own and a copy."""

from __future__ import annotations

import bisect
import hashlib
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ferro_checkpoint.checkpointer.memory.reused_blocks import ReusedBlocks
from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.layout.record import RECORD_NAME
from ferro_checkpoint.storage.storage import Bytes

Ranges = dict[str, list[tuple[int, int]]]
"""The first byte of each range, and one more than its last, by file, in the order in which they were written."""


class HeldCheckpoint:
    """Ranges of files in memory. The same memory serves one checkpoint after another.

    Attributes:
        name: of the checkpoint; "" while there is none.
        own: the memory of what this rank has written.
        copy: the memory of what another rank has written.
        small: the files that every rank has as a whole, such as the record, and the heads of the others: the
            segments in which their headers lie.
        sizes: of all files.
    """

    def __init__(self) -> None:
        self.name = ""
        self.own = ReusedBlocks()
        self.copy = ReusedBlocks()
        self.small: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self._ranges: dict[str, list[tuple[int, int, Bytes]]] = {}
        self._lock = threading.Lock()
        self._written: list[tuple[str, int, int]] = []  # file, first byte, one more than the last, of this rank's own

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return self.own.nbytes + self.copy.nbytes + sum(map(len, self.small.values()))

    @property
    def key(self) -> str:
        """What tells it from all others: a digest of its record; "" while it has none, and is no checkpoint."""
        record = self.small.get(RECORD_NAME)
        return "" if record is None else hashlib.blake2b(record, digest_size=16).hexdigest()

    def begin(self, name: str) -> None:
        """Forget what is held, and hold another checkpoint."""
        self.name = name
        self.small, self.sizes, self._ranges, self._written = {}, {}, {}, []
        self.own.reset()
        self.copy.reset()

    def release(self) -> None:
        """Hold nothing, and let go of the memory."""
        self.begin("")
        self.own.release()
        self.copy.release()

    def set_size(self, file: str, nbytes: int) -> None:
        """Note the size of a file."""
        self.sizes[file] = nbytes

    def size_of(self, file: str) -> int:
        """Return the size of a file, or raise FileNotFoundError."""
        if file not in self.sizes:
            raise FileNotFoundError(file)
        return self.sizes[file]

    def write(self, file: str, sources: Sequence[Bytes], offset: int) -> None:
        """Hold these bytes as this rank's own."""
        nbytes = sum(source.nbytes for source in sources)
        with self._lock:  # the order of the ranges is that of their memory
            block, begin = self.own.allocate(nbytes), 0
            self._written.append((file, offset, offset + nbytes))
        for source in sources:
            block[begin : begin + source.nbytes] = np.frombuffer(source, np.uint8)
            begin += source.nbytes
        with self._lock:
            self._hold(file, offset, block)

    def written(self) -> list[tuple[str, int, int]]:
        """List this rank's own ranges in the order in which the memory has them."""
        return self._written

    def hold_copy(self, ranges: Sequence[tuple[str, int, int]], block: NDArray[np.uint8]) -> None:
        """Hold another rank's ranges, whose bytes follow each other in `block`."""
        begin = 0
        for file, first, last in ranges:
            self._hold(file, first, block[begin : begin + last - first])
            begin += last - first

    def ranges(self, file: str) -> NDArray[np.int64]:
        """List the ranges of a file that are held: (n, 2), sorted, each first byte and one more than the last."""
        held = self._ranges.get(file, [])
        return np.array([(first, last) for first, last, _ in held], np.int64).reshape(-1, 2)

    def read_into(self, file: str, destinations: Sequence[Bytes], offset: int, path: str) -> None:
        """Fill the destinations with a file's bytes.

        Raises:
            CheckpointDamaged: this rank does not hold them.
        """
        head = self.small.get(file, b"")
        for destination in destinations:
            begin, end = offset, offset + destination.nbytes
            if end <= len(head):
                destination[:] = head[begin:end]
            else:
                self._copy(file, destination, begin, path)
            offset = end

    def _hold(self, file: str, first: int, block: NDArray[np.uint8]) -> None:
        if block.nbytes:
            held = self._ranges.setdefault(file, [])
            bisect.insort(held, (first, first + block.nbytes, block.data), key=lambda one: one[:2])

    def _copy(self, file: str, destination: Bytes, begin: int, path: str) -> None:
        held = self._ranges.get(file, [])
        done = 0
        index = bisect.bisect_right(held, begin, key=lambda one: one[0]) - 1
        while done < destination.nbytes:
            first, last, source = held[index] if 0 <= index < len(held) else (0, 0, memoryview(b""))
            at = begin + done
            if not first <= at < last:
                raise CheckpointDamaged(f"{path}/{file}: this rank does not hold byte {at}", path=f"{path}/{file}")
            count = min(last - at, destination.nbytes - done)
            destination[done : done + count] = source[at - first : at - first + count]
            done += count
            index += 1
