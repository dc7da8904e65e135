"""Reductions: of what does not fit a slot or is not even, in order of rank.

Each says what its ranks show each other chunk by chunk, what they take of what the others show,
and what they do instead with arrays that they can use where they are (see `operation`).
Methods take what those of `Backend` take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ferro.collectives.partition import blocks
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm.combine import reduce_into
from ferro_gloo.shm.operation import Answer, Operation, Runner
from ferro_gloo.shm.pieces import chunk, get, piece, piece_bytes, put, rounds_of

_BLOCK_BYTES = 256 << 10  # what is reduced at once, where it is: it stays in a core's cache


class Reductions:
    """One rank's part in them.

    Args:
        runner: carries operations out.
        rank: this rank.
        ranks: how many there are.
        slot_bytes: size of a slot.
    """

    def __init__(self, runner: Runner, rank: int, ranks: int, slot_bytes: int) -> None:
        self._runner = runner
        self._rank = rank
        self._ranks = ranks
        self._others = [other for other in range(ranks) if other != rank]
        self._slot_bytes = slot_bytes
        self._piece_bytes = piece_bytes(slot_bytes, ranks)

    def all_reduce(self, buffer: Array, reduction: Reduction, deadline: float) -> None:
        """See `Backend.all_reduce`."""

        def in_place(arrays: Mapping[int, Array]) -> None:
            self._reduce_everywhere(list(arrays.values()), buffer, reduction)

        if self._ranks == 2:  # each may as well reduce it all: that takes one round a chunk
            operation = self._by_all(buffer, reduction, takes=True)
            operation.shared, operation.in_place = buffer.view(np.uint8), in_place
            self._runner.run(operation, deadline)
        else:
            operation, answer = self._in_turns(buffer, reduction, takes=True)
            operation.shared, operation.in_place = buffer.view(np.uint8), in_place
            self._runner.run_in_turns(operation, answer, deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, deadline: float) -> None:
        """See `Backend.reduce`."""
        at_root = self._rank == root
        if self._ranks == 2:
            self._runner.run(self._by_all(buffer, reduction, takes=at_root), deadline)
        else:
            operation, answer = self._in_turns(buffer, reduction, takes=at_root)
            self._runner.run_in_turns(operation, answer, deadline)

    def reduce_scatter(
        self,
        source: Array,
        out: Array,
        counts: Sequence[int],
        reduction: Reduction,
        deadline: float,
    ) -> None:
        """See `Backend.reduce_scatter`."""
        me, length = self._rank, self._piece_bytes // source.itemsize
        parts = blocks(source, counts)

        def show(k: int, slot: Array) -> None:
            for rank in self._others:
                put(piece(slot, me, rank, length), chunk(parts[rank], k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            target = chunk(out, k, length)
            shown = [piece(slot, r, me, length)[: target.size] for r, slot in enumerate(slots)]
            shown[me] = chunk(parts[me], k, length)
            reduce_into(reduction, target, shown)

        def in_place(arrays: Mapping[int, Array]) -> None:
            mine = [blocks(array.view(source.dtype), counts)[me] for array in arrays.values()]
            step = _BLOCK_BYTES // source.itemsize
            for k in range(rounds_of(out.size, step)):
                operands = [chunk(part, k, step) for part in mine]
                reduce_into(reduction, chunk(out, k, step), operands)

        operation = Operation(
            rounds=rounds_of(max(counts), length),
            show=show,
            take=take,
            dtype=source.dtype,
            shared=source.view(np.uint8),
            in_place=in_place,
        )
        self._runner.run(operation, deadline)

    def _by_all(self, buffer: Array, reduction: Reduction, *, takes: bool) -> Operation:
        """Return the operation in which all show all of an array; who takes it reduces it all."""
        length = self._slot_bytes // buffer.itemsize

        def show(k: int, slot: Array) -> None:
            put(slot, chunk(buffer, k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            target = chunk(buffer, k, length)
            parts = [slot[: target.size] for slot in slots]
            parts[self._rank] = target  # one of two, which are read before anything is written
            reduce_into(reduction, target, parts)

        return Operation(
            rounds=rounds_of(buffer.size, length),
            show=show,
            take=take if takes else None,
            dtype=buffer.dtype,
        )

    def _in_turns(
        self, buffer: Array, reduction: Reduction, *, takes: bool
    ) -> tuple[Operation, Answer]:
        """Return the operation in which each is shown its part of a block, and shows the result.

        Source: the reduce-scatter and all-gather of Rabenseifner (see
            `ferro.collectives.direct.direct_all_reduce`), block by block, so that what is
            staged stays in the caches.
        """
        me, n, length = self._rank, self._ranks, self._piece_bytes // buffer.itemsize

        def part(k: int, rank: int) -> Array:
            block = chunk(buffer, k, n * length)
            return chunk(block, rank, -(-block.size // n))

        def show(k: int, slot: Array) -> None:
            for rank in self._others:
                put(piece(slot, me, rank, length), part(k, rank))

        def answer(k: int, slots: Sequence[Array], target: Array) -> None:
            own = part(k, me)
            parts = [piece(slot, r, me, length)[: own.size] for r, slot in enumerate(slots)]
            parts[me] = own
            result = target[: own.size]
            reduce_into(reduction, result, parts)
            own[...] = result

        def take(k: int, slots: Sequence[Array]) -> None:
            for rank in self._others:
                get(part(k, rank), slots[rank])

        operation = Operation(
            rounds=rounds_of(buffer.size, n * length),
            show=show,
            take=take if takes else None,
            dtype=buffer.dtype,
        )
        return operation, answer

    def _reduce_everywhere(
        self, arrays: Sequence[Array], like: Array, reduction: Reduction
    ) -> None:
        """Reduce this rank's part of everybody's array, and write it to all."""
        size = -(-like.size // self._ranks)
        parts = [chunk(array.view(like.dtype), self._rank, size) for array in arrays]
        step = _BLOCK_BYTES // like.itemsize
        for k in range(rounds_of(parts[0].size, step)):
            first, *others = operands = [chunk(part, k, step) for part in parts]
            reduce_into(reduction, first, operands)
            for other in others:
                other[...] = first
