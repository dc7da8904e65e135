"""Agreement: the ranks of one host compare their calls in shared memory before they exchange data.

When `agree` returns on a rank, all other ranks are in the same call. MPI's collectives need that, because they neither
notice a different call nor stop waiting.

Each rank writes one word, the digest of its call and the call's number, and reads the other ranks'
words. The words are double-buffered by the parity of the number: before a rank writes its word for
call k + 2, it has seen the words of all ranks for call k + 1, so all have read its word for call k.

    call       0             1             2 (as 0)
    rank 0     word 0   →    word 1   →    word 0
    rank 1     word 0   →    word 1   →    …

Small operands can be shared in the same step: a rank writes its operand into its slot before its word, and reads the
others' operands once all words are there. So a collective needs one synchronisation of the ranks, not two, which is
faster where there are more ranks than cores and each synchronisation costs switches between processes.

Where ranks share no memory they use the default agreement of `ferro.Backend`, which sends messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ferro import PeerLost
from ferro.collectives.label import Call, mismatch
from ferro.types import Array
from ferro_mpi.shared_memory import GroupMemory
from ferro_mpi.waiting import Backoff, WaitMonitor

_NUMBER_BITS = 16
_NUMBER_MASK = (1 << _NUMBER_BITS) - 1
_DIGEST_BYTES = 5  # with the bits of the call's number, a word is a positive 64-bit number
_MOST_CACHED = 1024
_PROGRESS_EVERY = 16  # reads between calls of MPI's progress


class SharedMemoryAgreement:
    """Agreement of one rank with all others on its host.

    Args:
        memory: the group's shared memory.
        monitor: ends the waits.
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(self, memory: GroupMemory, monitor: WaitMonitor, rank: int, world_size: int) -> None:
        self._memory = memory
        self._words = memory.words
        self._monitor = monitor
        self._rank = rank
        self._world_size = world_size
        self._number = 0
        self._slot_views: list[dict[tuple[np.dtype, int], Sequence[Array]]] = [{}, {}]
        self._digests: dict[bytes, int] = {}
        self._written_labels = [b"", b""]
        # For each parity: the index of this rank's word, and (index, rank) of the other ranks' words.
        self._own = [memory.word_index(rank, parity) for parity in (0, 1)]
        others = [other for other in range(world_size) if other != rank]
        self._others = [[(memory.word_index(r, parity), r) for r in others] for parity in (0, 1)]
        self._other_indices = [[index for index, _ in words] for words in self._others]

    def agree_with_operands(self, call: Call, operand: Array, deadline: float) -> Sequence[Array]:
        """Agree, and view all ranks' operands, which are read-only and valid until the next call.

        Args:
            call: this rank's call.
            operand: at most `GroupMemory.slot_bytes` long, of the same dtype and size on all ranks of one call.
            deadline: absolute `time.monotonic()` second.
        """
        parity = (self._number + 1) & 1
        key = (operand.dtype, operand.size)
        views = self._slot_views[parity].get(key) or self._view_slots(parity, operand)
        views[self._rank][...] = operand
        self.agree(call, deadline)
        return views

    def agree(self, call: Call, deadline: float) -> None:
        """See `Backend.agree`."""
        label = call.packed or call.label()
        digest = self._digests.get(label) or self._compute_digest(label)
        self._number = number = self._number + 1
        parity = number & 1
        if self._written_labels[parity] is not label:
            self._memory.write_label(label, parity)
            self._written_labels[parity] = label
        word = digest | (number & _NUMBER_MASK)
        words = self._words
        words[self._own[parity]] = word
        for index in self._other_indices[parity]:
            if words[index] != word:
                self._wait_for_all(call, word, parity, deadline)
                return

    def _wait_for_all(self, call: Call, word: int, parity: int, deadline: float) -> None:
        words, spins, yield_core = self._words, self._monitor.spins, self._monitor.yield_core
        for index, rank in self._others[parity]:
            for _ in range(spins):
                if words[index] == word:
                    break
                yield_core()
            else:
                self._wait_for_rank(call, word, parity, index, rank, deadline)

    def _wait_for_rank(self, call: Call, word: int, parity: int, index: int, rank: int, deadline: float) -> None:
        words, check = self._words, self._monitor.check
        backoff = Backoff()
        count = 0
        while (found := words[index]) != word:
            if found & _NUMBER_MASK == word & _NUMBER_MASK:
                raise mismatch(self._rank, call, rank, self._memory.label(rank, parity))
            check(deadline, (rank,))
            if self._memory.has_left(rank) and words[index] == found:
                raise PeerLost(f"rank {rank} has left the group", peer=rank)
            count += 1
            if count % _PROGRESS_EVERY == 0:
                self._monitor.progress()
            backoff()

    def _view_slots(self, parity: int, operand: Array) -> Sequence[Array]:
        """View the slots of a parity as arrays like `operand`; cache the views."""
        views = [
            self._memory.slot(rank, parity)[: operand.nbytes].view(operand.dtype) for rank in range(self._world_size)
        ]
        if len(self._slot_views[parity]) >= _MOST_CACHED:
            self._slot_views[parity].clear()
        self._slot_views[parity][operand.dtype, operand.size] = views
        return views

    def _compute_digest(self, label: bytes) -> int:
        digest = hashlib.blake2b(label, digest_size=_DIGEST_BYTES).digest()
        if len(self._digests) >= _MOST_CACHED:
            self._digests.clear()
        found = self._digests[label] = int.from_bytes(digest, "big") << _NUMBER_BITS
        return found
