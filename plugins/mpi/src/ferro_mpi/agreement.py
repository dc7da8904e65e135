"""Agreement: the ranks of one host compare their calls in shared memory before they exchange data.

When `agree` returns on a rank, all other ranks are in the same call, and go on with it. MPI's collectives need that,
because they neither notice a different call nor stop waiting.

Each rank writes one word, the digest of its call and the call's number, and reads the other ranks'
words. The words are double-buffered by the parity of the number: before a rank writes its word for
call k + 2, it has seen the words of all ranks for call k + 1, so all have read its word for call k.

    call       0             1             2 (as 0)
    rank 0     word 0   →    word 1   →    word 0
    rank 1     word 0   →    word 1   →    …

Small operands can be shared in the same step: a rank writes its operand into its slot before its word, and reads the
others' operands once all words are there. So a collective needs one synchronisation of the ranks, not two.

A rank that gives up waiting, at its deadline or after an abort, takes its word back, or else a late rank would go on
alone. It may do so only if no rank has seen all words:

    1  the rank writes TAKING_BACK in place of its word; ranks that read this wait until it is replaced
    2  it pauses, so that all see this, and then reads the other ranks' words
    3  if a word is missing, nobody has gone on: it writes TAKEN_BACK, and ranks that read this give up
    4  if all words are there, other ranks may have gone on: it writes its word again, and goes on as well

A rank that has seen all words looks at them once more before it goes on, as a word may have been taken back before the
last one was written. Of several ranks that take their words back, the lowest goes first.

Where ranks share no memory they use the default agreement of `ferro.Backend`, which sends messages.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import numpy as np

from ferro import GroupClosed, PeerLost
from ferro.collectives.label import Call, mismatch
from ferro.types import Array
from ferro_mpi.shared_memory import GroupMemory
from ferro_mpi.waiting import Backoff, WaitMonitor

_NUMBER_BITS = 16
NUMBER_MASK = (1 << _NUMBER_BITS) - 1
_DIGEST_BYTES = 5  # with the bits of the call's number, a word is a positive 64-bit number
_MOST_CACHED = 1024
_PROGRESS_EVERY = 16  # reads between calls of MPI's progress
_TAKING_BACK, _TAKEN_BACK = -1, -2  # in place of a word, which is positive
_PAUSE_S = 1e-3  # a processor shows its writes to the others within microseconds
_TAKE_BACK_S = 2.0  # after which a rank that is still taking its word back has stopped


class SharedMemoryAgreement:
    """Agreement of one rank with all others on its host.

    Args:
        memory: the group's shared memory.
        monitor: ends the waits.
        rank: this rank.
        world_size: number of ranks.

    Attributes:
        number: number of calls begun.
        word: this rank's word of the call that it has begun.
        words: the words of all ranks, as 64-bit numbers.
        own_words: for each parity, the index of this rank's word in `words`.
        written_labels: for each parity, the label of this rank that the others see.
        looks: for each parity, the indices in `words` at which this rank looks before it goes on, in order.
    """

    def __init__(self, memory: GroupMemory, monitor: WaitMonitor, rank: int, world_size: int) -> None:
        self._memory = memory
        self.words = memory.words
        self._monitor = monitor
        self._rank = rank
        self._world_size = world_size
        self.number = 0
        self.word = 0
        self._slot_views: list[dict[tuple[np.dtype, int], list[Array]]] = [{}, {}]
        self._digests: dict[bytes, int] = {}
        self.written_labels = [b"", b""]
        self.own_words = [memory.word_index(rank, parity) for parity in (0, 1)]
        # For each parity: index and rank of the other ranks' words.
        others = [other for other in range(world_size) if other != rank]
        self._others = [[(memory.word_index(r, parity), r) for r in others] for parity in (0, 1)]
        # Of one other rank's word, the second look would be the first.
        self.looks = [[index for index, _ in words] * min(2, len(words)) for words in self._others]

    def agree_with_operands(
        self, call: Call, operand: Array | None, dtype: np.dtype, count: int, deadline: float
    ) -> Sequence[Array]:
        """Agree, and view all ranks' operands, which are read-only and valid until the next call.

        Args:
            call: this rank's call.
            operand: what this rank shares, None if nothing: then its view has no meaning.
            dtype: of all operands.
            count: elements of each operand, the same on all ranks; at most `GroupMemory.slot_bytes` bytes.
            deadline: absolute `time.monotonic()` second.
        """
        parity = (self.number + 1) & 1
        views = self._slot_views[parity].get((dtype, count)) or self._view_slots(parity, dtype, count)
        if operand is not None:
            views[self._rank][...] = operand
        self.agree(call, deadline)
        return views

    def agree(self, call: Call, deadline: float) -> None:
        """See `Backend.agree`."""
        label = call.packed or call.label()
        parity = self.publish(label, self._digests.get(label) or self.digest(label))
        words, word = self.words, self.word
        for index in self.looks[parity]:
            if words[index] != word:
                self.wait_for_all(call, deadline)
                return

    def publish(self, label: bytes, digest: int) -> int:
        """Begin a call: write this rank's word, without waiting; return the call's parity.

        Args:
            label: of the call.
            digest: that of the label.
        """
        self.number = number = self.number + 1
        parity = number & 1
        if self.written_labels[parity] is not label:
            self.write_label(label, parity)
        self.word = word = digest | (number & NUMBER_MASK)
        self.words[self.own_words[parity]] = word
        return parity

    def publish_with(self, may_block: bool, label: bytes, digest: int) -> None:
        """Begin a call as `publish` does, and show whether this rank may use MPI's blocking call."""
        self.words[self.own_words[(self.number + 1) & 1] + 1] = may_block
        self.publish(label, digest)

    def write_label(self, label: bytes, parity: int) -> None:
        """Write this rank's label of a parity, for the errors of the other ranks."""
        self._memory.write_label(label, parity)
        self.written_labels[parity] = label

    def all_here(self) -> bool:
        """Say whether all ranks are in the call that this rank has begun."""
        words, word = self.words, self.word
        return all(words[index] == word for index in self.looks[self.number & 1])

    def agree_on_blocking(self, call: Call, may_block: bool, deadline: float) -> bool:
        """Agree; say whether every rank may use MPI's blocking call, which does not match a nonblocking one."""
        self.words[self.own_words[(self.number + 1) & 1] + 1] = may_block
        self.agree(call, deadline)
        return self.all_may_block()

    def all_may_block(self) -> bool:
        """Say whether all ranks that agreed on the current call may block."""
        parity = self.number & 1
        for index in self.looks[parity]:  # without a generator, which costs as much as four looks
            if not self.words[index + 1]:
                return False
        return bool(self.words[self.own_words[parity] + 1])

    def take_back(self) -> bool:
        """Take this rank's word for the current call back; return False if other ranks may have gone on with the call.

        Then the word is there again, and this rank has to go on as well.
        """
        words, parity, give_up = self.words, self.number & 1, time.monotonic() + _TAKE_BACK_S
        own, word = self.own_words[parity], self.word
        while words[own] != _TAKEN_BACK:
            words[own] = _TAKING_BACK
            time.sleep(_PAUSE_S)
            found = [(rank, words[index]) for index, rank in self._others[parity]]
            undecided = [rank for rank, value in found if value == _TAKING_BACK]
            if not undecided or time.monotonic() > give_up:
                all_here = all(value == word for _, value in found)
                words[own] = word if all_here else _TAKEN_BACK
                return not all_here
            if undecided[0] < self._rank:
                words[own] = word
                lower = self._memory.word_index(undecided[0], parity)
                while words[lower] == _TAKING_BACK and time.monotonic() <= give_up:
                    time.sleep(_PAUSE_S)
        return True

    def wait_for_all(self, call: Call, deadline: float) -> None:
        """Wait until all ranks are in the call that this rank has begun.

        Raises:
            CollectiveMismatch: another rank makes another call.
            TimeoutError, GroupClosed, PeerLost: see `WaitMonitor.check`.
        """
        word, parity = self.word, self.number & 1
        words, spins, yield_core = self.words, self._monitor.spins, self._monitor.yield_core
        try:
            while not self.all_here():
                for index, rank in self._others[parity]:
                    for _ in range(spins):
                        if words[index] == word:
                            break
                        yield_core()
                    else:
                        self._wait_for_rank(call, word, parity, index, rank, deadline)
        except (TimeoutError, GroupClosed) as error:
            of_program = isinstance(error, TimeoutError) and time.monotonic() <= deadline
            if of_program or self.take_back():
                raise

    def _wait_for_rank(self, call: Call, word: int, parity: int, index: int, rank: int, deadline: float) -> None:
        words, check = self.words, self._monitor.check
        backoff = Backoff()
        count = 0
        while (found := words[index]) != word:
            if found == _TAKEN_BACK:
                raise GroupClosed(f"rank {rank} has given up")
            if found > 0 and found & NUMBER_MASK == word & NUMBER_MASK:
                raise mismatch(self._rank, call, rank, self._memory.label(rank, parity))
            check(deadline, (rank,))
            if self._memory.has_left(rank) and words[index] == found:
                raise PeerLost(f"rank {rank} has left the group", peer=rank)
            count += 1
            if count % _PROGRESS_EVERY == 0:
                self._monitor.progress()
            backoff()

    def slots(self, parity: int, dtype: np.dtype, count: int) -> Array:
        """View all ranks' slots of a parity as an array of shape (ranks, count)."""
        return self._memory.slots(parity, count * dtype.itemsize).view(dtype)

    def _view_slots(self, parity: int, dtype: np.dtype, count: int) -> list[Array]:
        """View all ranks' slots of a parity as flat arrays, and cache the views."""
        if len(self._slot_views[parity]) >= _MOST_CACHED:
            self._slot_views[parity].clear()
        views = self._slot_views[parity][dtype, count] = list(self.slots(parity, dtype, count))
        return views

    def digest(self, label: bytes) -> int:
        """Compute what a label's words begin with; the result is cached."""
        digest = hashlib.blake2b(label, digest_size=_DIGEST_BYTES).digest()
        if len(self._digests) >= _MOST_CACHED:
            self._digests.clear()
        found = self._digests[label] = int.from_bytes(digest, "big") << _NUMBER_BITS
        return found
