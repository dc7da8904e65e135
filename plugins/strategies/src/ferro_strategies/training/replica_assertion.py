"""assert_replicas_equal: compare the replicas of a model, array by array."""

from __future__ import annotations

import hashlib

import numpy as np

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, namespace_of
from ..nn.module import Module
from ..replicas import check_module_and_group


def assert_replicas_equal(model: Module, group: ProcessGroup) -> None:
    """Compare all parameters and buffers of all ranks of a group, bit for bit.

    All ranks call it. It exchanges a checksum for each array, and an array only where a checksum differs.

    Raises:
        AssertionError: an array differs; raised on every rank, with its name, the ranks, and the first element.
        UsageError: a parameter is split over ranks of the group, which therefore have pieces, and no replicas.
    """
    check_module_and_group("assert_replicas_equal", model, group)
    others = {*group.global_ranks} - {group.global_ranks[group.rank]}
    split = [name for name, p in model.named_parameters() if any(others & {*s.group.global_ranks} for s in p.splits)]
    arrays = {f"parameter {name!r}": _on_host(p.data) for name, p in model.named_parameters() if name not in split}
    arrays |= {f"buffer {name!r}": _on_host(buffer.data) for name, buffer in model.named_buffers()}
    own = [(name, f"{array.dtype} {array.shape}", _checksum(array)) for name, array in arrays.items()]
    everyones = [(found[0], list(map(tuple, found[1]))) for found in group.all_gather_object((split, own))]
    if broken := next((found[0] for found in everyones if found[0]), None):
        raise UsageError(
            f"assert_replicas_equal on group {group.name!r}: parameter {broken[0]!r} is in pieces over ranks of this "
            'group: take another axis of the mesh, as mesh["dp"].',
            group=group.name,
            rank=group.rank,
        )
    lists = [found[1] for found in everyones]
    names = [[entry[:2] for entry in entries] for entries in lists]
    for rank, found in enumerate(names):
        if found != names[0]:
            here, there = _first_difference(found, names[0])
            raise AssertionError(f"the models differ: rank {rank} has {here} where rank 0 has {there}")
    for index, (name, _, _) in enumerate(own):
        checksums = [entries[index][2] for entries in lists]
        if len(set(checksums)) > 1:
            raise AssertionError(_describe(name, arrays[name], checksums, group))


def _on_host(array: Array) -> Array:
    host: Array = array if isinstance(array, np.ndarray) else namespace_of(array).asnumpy(array)
    return host


def _checksum(array: Array) -> bytes:
    return hashlib.blake2b(_bytes(array).data, digest_size=16).digest()


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _first_difference(found: list[tuple[str, ...]], expected: list[tuple[str, ...]]) -> tuple[str, str]:
    for position in range(max(len(found), len(expected))):
        here, there = (" of ".join(some[position]) if position < len(some) else "nothing" for some in (found, expected))
        if here != there:
            return here, there
    return "the same", "the same"


def _describe(name: str, array: Array, checksums: list[bytes], group: ProcessGroup) -> str:
    """Find the first element in which a rank differs from rank 0; all ranks take part."""
    flat = np.ascontiguousarray(array).reshape(-1)
    first = group.broadcast(_bytes(array), 0).view(flat.dtype)
    differs = (_bytes(flat) != _bytes(first)).reshape(flat.size, -1).any(axis=1)
    own = int(np.argmax(differs)) if differs.any() else flat.size
    place = int(group.all_reduce(np.array(own), "min"))
    values = group.all_gather_object(str(flat[place]))
    by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        by_value.setdefault(value, []).append(rank)
    element = tuple(map(int, np.unravel_index(place, array.shape)))
    shown = ", ".join(f"{value} on rank{'s' * (len(ranks) > 1)} {_listed(ranks)}" for value, ranks in by_value.items())
    ranks = _listed([rank for rank, checksum in enumerate(checksums) if checksum != checksums[0]])
    return f"{name} is not the same on all ranks: rank(s) {ranks} differ from rank 0; element {element} is {shown}"


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
