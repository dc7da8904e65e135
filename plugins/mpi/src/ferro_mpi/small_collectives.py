"""SmallCollective: the fast path of collectives whose operands are shared with the agreement (see `agreement`).

It does what the ordinary path does in shared memory, in fewer steps of Python: write this rank's operand and word, wait
for the other ranks' words, make the result of all operands. So a rank on this path meets others on the ordinary one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ferro.collectives.fast_path import BUSY, NUMBER, BoundFastPath, EvenCollective, Turn
from ferro.types import Array
from ferro_mpi.agreement import NUMBER_MASK, SharedMemoryAgreement
from ferro_mpi.shared_operands import MakeResult, as_bytes, result_copier, result_maker, shared_count
from ferro_mpi.waiting import WaitMonitor


class SmallCollective:
    """A collective of one kind and size on one rank; see `FastPath`. All calls have the shapes of the first.

    Args:
        collective: its kind; what a rank shares fits into a slot of the group's memory.
        turn: the order of the group's collectives.
        agreement: the group's agreement.
        monitor: says how long to spin.
        rank: this rank.
        world_size: number of ranks.
    """

    __slots__ = (
        "_agreement",
        "_collective",
        "_digest",
        "_is_locked",
        "_is_prepared",
        "_label",
        "_lock",
        "_looks",
        "_make_result",
        "_monitor",
        "_own_words",
        "_pending",
        "_rank",
        "_slots",
        "_spins",
        "_state",
        "_turn",
        "_words",
        "_world_size",
        "_written_labels",
        "_yield_core",
    )

    def __init__(
        self,
        collective: EvenCollective,
        turn: Turn,
        agreement: SharedMemoryAgreement,
        monitor: WaitMonitor,
        rank: int,
        world_size: int,
    ) -> None:
        self._collective = collective
        self._turn = turn
        self._lock, self._pending, self._state = turn.lock, turn.pending, turn.state
        self._is_locked = turn.lock.locked
        self._agreement = agreement
        self._words, self._own_words, self._looks = agreement.words, agreement.own_words, agreement.looks
        self._written_labels = agreement.written_labels
        self._monitor = monitor
        self._spins = range(monitor.spins)
        self._yield_core = monitor.yield_core if monitor.oversubscribed else None
        self._label = collective.call.label()
        self._digest = agreement.digest(self._label)
        self._rank = rank
        self._world_size = world_size
        self._is_prepared = False
        # This rank's slot for each parity: an array in the shape of its input, or a memoryview as the input is.
        self._slots: Sequence[Any] = ()
        self._make_result: MakeResult = _make_nothing

    def __call__(self, source: Array | None, target: Array | None, /) -> bool:
        """See `FastPath.__call__`. The group has checked dtypes and shapes; a source may have any strides."""
        if target is not None and not target.flags.carray:
            return False
        return self.run(source, target)

    def run(self, source: Array | memoryview | None, target: Array | None) -> bool:
        """Run the collective on buffers that are known to be good, or return False if the turn is another's."""
        if self._is_locked():
            return False
        with self._lock:  # if another thread takes it just now, that thread also lets it go by itself
            state, label = self._state, self._label
            if state[BUSY] or self._pending:
                return False
            try:
                if not self._is_prepared:
                    self._prepare(source, target)
                # The following is `_begin`, with `SharedMemoryAgreement.publish`, inlined because each call costs.
                agreement, words = self._agreement, self._words
                number = agreement.number + 1
                parity = number & 1
                if source is not None:
                    self._slots[parity][:] = source
                if self._written_labels[parity] is not label:
                    agreement.write_label(label, parity)
                agreement.number = number
                agreement.word = words[self._own_words[parity]] = word = self._digest | (number & NUMBER_MASK)
                state[NUMBER] += 1
                for index in self._looks[parity]:
                    if words[index] != word:
                        self._wait()
                        break
                if target is not None:
                    self._make_result(parity, target)
            except BaseException as error:
                self._end_group(error)
                raise
        return True

    def bind(self, source: Array | None, target: Array | None, /) -> BoundFastPath | None:
        """See `FastPath.bind`."""
        if target is not None and not target.flags.carray:
            return None
        return BoundSmallCollective(self._for_buffers(source, target), source, target)

    def start(self, source: Array | memoryview | None, target: Array | None) -> None:
        """Begin the collective, of which the caller has the turn, without waiting."""
        try:
            self._begin(source, target)
        except BaseException as error:
            self._end_group(error)
            raise

    def all_here(self) -> bool:
        """Say whether all ranks are in the collective that was started."""
        return self._agreement.all_here()

    def finish(self, target: Array | None) -> None:
        """Wait for the other ranks in the collective that was started, and make the result."""
        try:
            if not self._agreement.all_here():
                self._wait()
            if target is not None:
                self._make_result(self._agreement.number & 1, target)
        except BaseException as error:
            self._end_group(error)
            raise

    def _begin(self, source: Array | memoryview | None, target: Array | None) -> None:
        """Share this rank's operand, and show its word."""
        if not self._is_prepared:
            self._prepare(source, target)
        if source is not None:
            self._slots[(self._agreement.number + 1) & 1][:] = source
        self._agreement.publish(self._label, self._digest)
        self._state[NUMBER] += 1

    def _wait(self) -> None:
        """Wait until all ranks are in the call that this rank has begun."""
        words, word, yield_core = self._words, self._agreement.word, self._yield_core
        for index in self._looks[self._agreement.number & 1]:
            for _ in self._spins:
                if words[index] == word:
                    break
                if yield_core is not None:
                    yield_core()
            else:
                self._turn.late(self._collective.call, self._wait_for_late)
                return

    def _wait_for_late(self, *, deadline: float) -> None:
        self._agreement.wait_for_all(self._collective.call, deadline)

    def _end_group(self, error: BaseException) -> None:
        """End the group, in whose collective an exception was raised, unless `late` has."""

        def raise_error(*, deadline: float) -> None:
            raise error

        if not self._state[BUSY]:
            self._turn.late(self._collective.call, raise_error)

    def _all_slots(self) -> list[Array]:
        """View the slots of all ranks, for each parity, as they are shared in this collective."""
        collective = self._collective
        count = shared_count(collective.op, collective.count, self._world_size)
        return [self._agreement.slots(parity, collective.dtype, count) for parity in (0, 1)]

    def _prepare(self, source: Array | memoryview | None, target: Array | None) -> None:
        """View the slots in the shapes of the arrays."""
        slots = self._all_slots()
        if isinstance(source, np.ndarray):
            self._slots = [operands[self._rank].reshape(source.shape or 1) for operands in slots]
        if target is not None:
            self._make_result = result_maker(self._collective, slots, self._rank, target.shape)
        self._is_prepared = True

    def _for_buffers(self, source: Array | None, target: Array | None) -> SmallCollective:
        """Make the same collective for one pair of buffers, which it copies as bytes: that is quicker."""
        agreement, monitor = self._agreement, self._monitor
        bound = SmallCollective(self._collective, self._turn, agreement, monitor, self._rank, self._world_size)
        bound._prepare(source, target)
        slots = self._all_slots()
        if source is not None and source.flags.c_contiguous:
            bound._slots = [as_bytes(operands[self._rank]) for operands in slots]
        if target is not None and self._collective.reduction is None:
            bound._make_result = result_copier(self._collective, slots, self._rank, target)
        return bound


def _make_nothing(parity: int, target: Array) -> None:
    """Make the result of a rank that gets none."""


class BoundSmallCollective:
    """A small collective with its buffers; see `BoundFastPath`."""

    __slots__ = ("_collective", "_run", "_source", "_target")

    def __init__(self, collective: SmallCollective, source: Array | None, target: Array | None) -> None:
        self._collective = collective
        self._run = collective.run
        self._source: Array | memoryview | None = source
        if source is not None and source.flags.c_contiguous:
            self._source = as_bytes(source)
        self._target = target

    def __call__(self) -> bool:
        """See `FastPath.__call__`."""
        return self._run(self._source, self._target)

    def start(self) -> bool:
        """See `BoundFastPath.start`."""
        self._collective.start(self._source, self._target)
        return True

    def test(self) -> bool:
        """See `BoundFastPath.test`."""
        return self._collective.all_here()

    def finish(self) -> None:
        """See `BoundFastPath.finish`."""
        self._collective.finish(self._target)

    def close(self) -> None:
        """See `BoundFastPath.close`."""
        self._source = self._target = None
