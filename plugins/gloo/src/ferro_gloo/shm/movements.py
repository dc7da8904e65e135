"""Movements: broadcast, gather, scatter and the like, of what does not fit a slot or is not even.

Each says what its ranks show each other chunk by chunk, what they take of what the others show,
and what they do instead with arrays that they can use where they are (see `operation`).
Methods take what those of `Backend` take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ferro.collectives.partition import blocks
from ferro.types import Array
from ferro_gloo.shm.operation import Operation, Runner
from ferro_gloo.shm.pieces import chunk, landing, piece, piece_bytes, put, rounds_of


class Movements:
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

    def broadcast(self, buffer: Array, root: int, deadline: float) -> None:
        """See `Backend.broadcast`."""
        data, length = buffer.view(np.uint8), self._slot_bytes
        at_root = self._rank == root
        get, copy = landing(data.size * self._ranks)

        def show(k: int, slot: Array) -> None:
            put(slot, chunk(data, k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            get(chunk(data, k, length), slots[root])

        def in_place(arrays: Mapping[int, Array]) -> None:
            if not at_root:
                copy(data, arrays[root])

        operation = Operation(
            rounds=rounds_of(data.size, length),
            show=show if at_root else None,
            take=None if at_root else take,
            shared=data if at_root else None,
            showing=(root,),
            in_place=in_place,
        )
        self._runner.run(operation, deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], deadline: float) -> None:
        """See `Backend.all_gather`."""
        data, length = buffer.view(np.uint8), self._slot_bytes
        sizes = _bytes(counts, buffer)
        parts = blocks(data, sizes)
        get, copy = landing(data.size * self._ranks)

        def show(k: int, slot: Array) -> None:
            put(slot, chunk(parts[self._rank], k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            for rank in self._others:
                get(chunk(parts[rank], k, length), slots[rank])

        def in_place(arrays: Mapping[int, Array]) -> None:
            for rank in self._others:
                copy(parts[rank], blocks(arrays[rank], sizes)[rank])

        operation = Operation(
            rounds=rounds_of(max(sizes), length),
            show=show,
            take=take,
            shared=data,
            in_place=in_place,
        )
        self._runner.run(operation, deadline)

    def gather(
        self, block: Array, out: Array | None, counts: Sequence[int], root: int, deadline: float
    ) -> None:
        """See `Backend.gather`."""
        data, length = block.view(np.uint8), self._slot_bytes
        sizes = _bytes(counts, block)
        get, copy = landing(sum(sizes))
        others: dict[int, Array] = {}  # their places in the result, at the root
        if out is not None:
            others = dict(enumerate(blocks(out.view(np.uint8), sizes)))
            others.pop(root)[...] = data

        def show(k: int, slot: Array) -> None:
            put(slot, chunk(data, k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            for rank, target in others.items():
                get(chunk(target, k, length), slots[rank])

        def in_place(arrays: Mapping[int, Array]) -> None:
            for rank, target in others.items():
                copy(target, arrays[rank])

        operation = Operation(
            rounds=rounds_of(max(sizes), length),
            show=show if out is None else None,
            take=take,
            shared=data if out is None else None,
            showing=[rank for rank in range(len(counts)) if rank != root],
            in_place=in_place,
        )
        self._runner.run(operation, deadline)

    def scatter(
        self,
        block: Array,
        source: Array | None,
        counts: Sequence[int],
        root: int,
        deadline: float,
    ) -> None:
        """See `Backend.scatter`."""
        me, data, length = self._rank, block.view(np.uint8), self._piece_bytes
        sizes = _bytes(counts, block)
        get, copy = landing(sum(sizes))
        others: dict[int, Array] = {}  # what is for them, at the root
        whole = None if source is None else source.view(np.uint8)
        if whole is not None:
            others = dict(enumerate(blocks(whole, sizes)))
            data[...] = others.pop(root)

        def show(k: int, slot: Array) -> None:
            for rank, part in others.items():
                put(piece(slot, root, rank, length), chunk(part, k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            get(chunk(data, k, length), piece(slots[root], root, me, length))

        def in_place(arrays: Mapping[int, Array]) -> None:
            if whole is None:
                copy(data, blocks(arrays[root], sizes)[me])

        operation = Operation(
            rounds=rounds_of(max(sizes), length),
            show=None if whole is None else show,
            take=take if whole is None else None,
            shared=whole,
            showing=(root,),
            in_place=in_place,
        )
        self._runner.run(operation, deadline)

    def all_to_all(
        self,
        source: Array,
        out: Array,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        deadline: float,
        *,
        met: bool,
    ) -> None:
        """See `Backend.all_to_all`; `met`: this rank has met the others already, in `small`."""
        me, length, data = self._rank, self._piece_bytes, source.view(np.uint8)
        sizes = _bytes(send_counts, source)
        parts = blocks(data, sizes)
        targets = blocks(out.view(np.uint8), _bytes(recv_counts, out))
        get, copy = landing(out.nbytes * self._ranks)
        copy(targets[me], parts[me])

        def show(k: int, slot: Array) -> None:
            for rank in self._others:
                put(piece(slot, me, rank, length), chunk(parts[rank], k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            for rank in self._others:
                get(chunk(targets[rank], k, length), piece(slots[rank], rank, me, length))

        def in_place(arrays: Mapping[int, Array]) -> None:
            for rank in self._others:
                copy(targets[rank], blocks(arrays[rank], sizes)[me])

        # Where all blocks are of one size, a rank knows where its own are in the others' arrays;
        # and where it has met them, others have uneven ones.
        even = not met and len({*send_counts, *recv_counts}) == 1
        operation = Operation(
            rounds=rounds_of(max(sizes), length),
            show=show,
            take=take,
            shared=data if even else None,
            in_place=in_place,
            uneven=True,
        )
        self._runner.run(operation, deadline)


def _bytes(counts: Sequence[int], like: Array) -> list[int]:
    return [count * like.itemsize for count in counts]
