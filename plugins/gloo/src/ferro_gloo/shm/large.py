"""Large: the collectives of what does not fit a slot, or is not even.

Each says what its ranks show each other chunk by chunk, what they take of what the others show,
and what they do instead when all arrays can be used in place (see `operation`). Methods take what
those of `Backend` take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from ferro.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm.operation import Operation, Runner

_BLOCK_BYTES = 256 << 10  # what is reduced in place at once: it stays in a core's cache
_LINE_BYTES = 64


class Large:
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
        # A slot in which there is something else for every rank, from cache line to cache line.
        self._piece_bytes = slot_bytes // ranks // _LINE_BYTES * _LINE_BYTES

    def all_reduce(self, buffer: Array, reduction: Reduction, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        if self._ranks == 2:  # each may as well reduce it all: that takes one round a chunk
            operation = self._reduction(buffer, reduction, takes=True)
            operation.shared = buffer.view(np.uint8)
            operation.in_place = lambda arrays: self._reduce_in_place(arrays, buffer, reduction)
            self._runner.run(operation, deadline)
        else:
            self._reduce_in_turns(buffer, reduction, deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, deadline: float) -> None:
        """See `Backend.reduce`."""
        operation = self._reduction(buffer, reduction, takes=self._rank == root)
        self._runner.run(operation, deadline)

    def broadcast(self, buffer: Array, root: int, deadline: float) -> None:
        """See `Backend.broadcast`."""
        data, length = buffer.view(np.uint8), self._slot_bytes
        at_root = self._rank == root

        def show(k: int, slot: Array) -> None:
            if at_root:
                _put(slot, _chunk(data, k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            if not at_root:
                _get(_chunk(data, k, length), slots[root])

        def copy(arrays: Mapping[int, Array]) -> None:
            if not at_root:
                data[...] = arrays[root]

        operation = Operation(
            rounds=_rounds(data.size, length),
            show=show,
            take=take,
            shared=data if at_root else None,
            showing=(root,),
            in_place=copy,
        )
        self._runner.run(operation, deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], deadline: float) -> None:
        """See `Backend.all_gather`."""
        data, length = buffer.view(np.uint8), self._slot_bytes
        ends = _ends(counts, buffer.itemsize)
        blocks = [data[slice(*end)] for end in ends]

        def show(k: int, slot: Array) -> None:
            _put(slot, _chunk(blocks[self._rank], k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            for rank in self._others:
                _get(_chunk(blocks[rank], k, length), slots[rank])

        def copy(arrays: Mapping[int, Array]) -> None:
            for rank in self._others:
                blocks[rank][...] = arrays[rank][slice(*ends[rank])]

        operation = Operation(
            rounds=_rounds(max(block.size for block in blocks), length),
            show=show,
            take=take,
            shared=data,
            in_place=copy,
        )
        self._runner.run(operation, deadline)

    def gather(
        self, block: Array, out: Array | None, counts: Sequence[int], root: int, deadline: float
    ) -> None:
        """See `Backend.gather`."""
        data, length, size = block.view(np.uint8), self._slot_bytes, block.itemsize
        blocks: dict[int, Array] = {}  # the others', at the root
        if out is not None:
            whole = out.view(np.uint8)
            blocks = {rank: whole[slice(*end)] for rank, end in enumerate(_ends(counts, size))}
            blocks.pop(root)[...] = data

        def show(k: int, slot: Array) -> None:
            if out is None:
                _put(slot, _chunk(data, k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            for rank, target in blocks.items():
                _get(_chunk(target, k, length), slots[rank])

        def copy(arrays: Mapping[int, Array]) -> None:
            for rank, target in blocks.items():
                target[...] = arrays[rank]

        operation = Operation(
            rounds=_rounds(max(counts) * size, length),
            show=show,
            take=take,
            shared=data if out is None else None,
            showing=[rank for rank in range(self._ranks) if rank != root],
            in_place=copy,
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
        data, length = block.view(np.uint8), self._piece_bytes
        ends = _ends(counts, block.itemsize)
        whole = None if source is None else source.view(np.uint8)

        blocks = [] if whole is None else [whole[slice(*end)] for end in ends]

        def show(k: int, slot: Array) -> None:
            for rank, part in enumerate(blocks):
                _put(slot[rank * length :], _chunk(part, k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            _get(_chunk(data, k, length), slots[root][self._rank * length :])

        def copy(arrays: Mapping[int, Array]) -> None:
            data[...] = arrays[root][slice(*ends[self._rank])]

        operation = Operation(
            rounds=_rounds(max(counts) * block.itemsize, length),
            show=show,
            take=take,
            shared=whole,
            showing=(root,),
            in_place=copy,
        )
        self._runner.run(operation, deadline)

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
        ends = _ends(counts)
        blocks = [source[slice(*end)] for end in ends]

        def show(k: int, slot: Array) -> None:
            for rank in self._others:
                _put(slot[rank * length :], _chunk(blocks[rank], k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            target = _chunk(out, k, length)
            parts = [slot[me * length : me * length + target.size] for slot in slots]
            parts[me] = _chunk(blocks[me], k, length)
            reduction.into(target, parts, at_once=True)

        def reduce(arrays: Mapping[int, Array]) -> None:
            parts = [arrays[rank].view(source.dtype)[slice(*ends[me])] for rank in sorted(arrays)]
            step = _BLOCK_BYTES // source.itemsize
            for k in range(_rounds(out.size, step)):
                target = _chunk(out, k, step)
                reduction.into(target, [_chunk(part, k, step) for part in parts], at_once=True)

        operation = Operation(
            rounds=_rounds(max(counts), length),
            show=show,
            take=take,
            dtype=source.dtype,
            shared=source.view(np.uint8),
            in_place=reduce,
        )
        self._runner.run(operation, deadline)

    def all_to_all(
        self,
        source: Array,
        out: Array,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        deadline: float,
    ) -> None:
        """See `Backend.all_to_all`."""
        me, length, size = self._rank, self._piece_bytes, source.itemsize
        data, ends = source.view(np.uint8), _ends(send_counts, size)
        targets = [out.view(np.uint8)[slice(*end)] for end in _ends(recv_counts, size)]
        targets[me][...] = data[slice(*ends[me])]

        def show(k: int, slot: Array) -> None:
            for rank in self._others:
                _put(slot[rank * length :], _chunk(data[slice(*ends[rank])], k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            for rank in self._others:
                _get(_chunk(targets[rank], k, length), slots[rank][me * length :])

        def copy(arrays: Mapping[int, Array]) -> None:
            for rank in self._others:
                targets[rank][...] = arrays[rank][slice(*ends[me])]

        # Where all blocks are of one size, a rank knows where its own are in the others' arrays.
        even = len({*send_counts, *recv_counts}) == 1
        operation = Operation(
            rounds=_rounds(max(send_counts) * size, length),
            show=show,
            take=take,
            shared=data if even else None,
            in_place=copy,
            uneven=True,
        )
        self._runner.run(operation, deadline)

    # -- reductions ------------------------------------------------------------------------------

    def _reduction(self, buffer: Array, reduction: Reduction, *, takes: bool) -> Operation:
        """Return the operation in which all show all of an array; who takes it reduces it all."""
        length = self._slot_bytes // buffer.itemsize

        def show(k: int, slot: Array) -> None:
            _put(slot, _chunk(buffer, k, length))

        def take(k: int, slots: Sequence[Array]) -> None:
            target = _chunk(buffer, k, length)
            parts = [slot[: target.size] for slot in slots]
            if self._rank < 2:  # one of the first two, which are read before anything is written
                parts[self._rank] = target
            reduction.into(target, parts, at_once=True)

        return Operation(
            rounds=_rounds(buffer.size, length),
            show=show,
            take=take if takes else None,
            dtype=buffer.dtype,
        )

    def _reduce_in_turns(self, buffer: Array, reduction: Reduction, deadline: float) -> None:
        """All-reduce: each rank is shown its piece of a block, reduces it, shows the result.

        Source: the reduce-scatter and all-gather of Rabenseifner (see
            `ferro.collectives.direct.direct_all_reduce`), block by block, so that what is
            staged stays in the caches.
        """
        me, n, length = self._rank, self._ranks, self._piece_bytes // buffer.itemsize

        def piece(k: int, rank: int) -> Array:
            block = _chunk(buffer, k, n * length)
            return _chunk(block, rank, -(-block.size // n))

        def show(k: int, slot: Array) -> None:
            for rank in self._others:
                _put(slot[rank * length :], piece(k, rank))

        def answer(k: int, slots: Sequence[Array], target: Array) -> None:
            own = piece(k, me)
            parts = [slot[me * length : me * length + own.size] for slot in slots]
            parts[me] = own
            result = target[: own.size]
            reduction.into(result, parts, at_once=True)
            own[...] = result

        def take(k: int, slots: Sequence[Array]) -> None:
            for rank in self._others:
                _get(piece(k, rank), slots[rank])

        operation = Operation(
            rounds=_rounds(buffer.size, n * length),
            show=show,
            take=take,
            dtype=buffer.dtype,
            shared=buffer.view(np.uint8),
            in_place=lambda arrays: self._reduce_in_place(arrays, buffer, reduction),
        )
        self._runner.run_in_turns(operation, answer, deadline)

    def _reduce_in_place(
        self, arrays: Mapping[int, Array], like: Array, reduction: Reduction
    ) -> None:
        """Reduce this rank's part of everybody's array, and write it to all."""
        part = -(-like.size // self._ranks)
        parts = [_chunk(arrays[r].view(like.dtype), self._rank, part) for r in sorted(arrays)]
        step = _BLOCK_BYTES // like.itemsize
        for k in range(_rounds(parts[0].size, step)):
            first, *others = operands = [_chunk(part, k, step) for part in parts]
            reduction.into(first, operands, at_once=True)
            for other in others:
                other[...] = first


def _rounds(size: int, length: int) -> int:
    """Return how many chunks something is cut into; at least one, be it empty."""
    return max(1, -(-size // length))


def _chunk(array: Array, k: int, length: int) -> Array:
    return array[k * length : (k + 1) * length]


def _ends(counts: Sequence[int], size: int = 1) -> list[tuple[int, int]]:
    """Return where each rank's block begins and ends, when elements have this size."""
    ends = [end * size for end in accumulate(counts)]
    return list(zip([0, *ends], ends, strict=False))


def _put(slot: Array, chunk: Array) -> None:
    slot[: chunk.size] = chunk


def _get(target: Array, slot: Array) -> None:
    target[...] = slot[: target.size]
