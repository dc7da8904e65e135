"""Microbatches: splitting a batch into them, putting their outputs together, and the size of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from ferro import UsageError
from ferro.arrays import lost_meaning

from ...nn.arrays import Array, namespace_of
from ...nn.trees import Arrays, describe, leaves, map_leaves, structure

# A whole batch, to be split along axis 0: an array, or a tuple or dict of arrays. Or a list of its microbatches.
Batch: TypeAlias = Any


def split_batch(batch: Batch | None, microbatches: int, role: str) -> list[Arrays]:
    """Return the microbatches of a batch: the given ones, or the parts by `numpy.array_split`.

    Args:
        batch: (rows, …), or a tree of arrays with equally many rows (tuple, dict or namedtuple, which may nest), or a
            list with one array or tree for each microbatch, of any shapes. With fewer rows than microbatches, the last
            parts have none. A leaf that is no array, such as None or a number, goes to every microbatch.
        microbatches: number of parts.
        role: "inputs" or "targets", for error messages.

    Raises:
        UsageError: there is no batch, it cannot be split, or it has another number of parts.
    """
    if batch is None:
        raise UsageError(f"this rank has the stage that takes the {role}, and got None. Pass them.")
    if isinstance(batch, list):
        if len(batch) != microbatches:
            raise UsageError(
                f"the {role} are a list of {len(batch)} microbatches, where microbatches="
                f"{microbatches}. Pass one array for each, or one to be cut; or, on every rank, "
                f"microbatches={len(batch)}: to forward, or to Pipeline for step. Several arrays that belong together "
                "are passed as a tuple or dict."
            )
        for part in batch:
            if not _arrays(part, role):
                namespace_of(part)
        return batch.copy()
    arrays = _arrays(batch, role)
    if not arrays:
        namespace_of(batch)  # raises, and names the type
    rows = [None if array.ndim == 0 else array.shape[0] for array in arrays]
    if None in rows:
        raise UsageError(
            f"the {role} are a single number, or contain one, which has no rows to cut: {describe(batch)}."
        )
    if len({*rows}) > 1:
        raise UsageError(f"the arrays of the {role} have different numbers of rows, {rows}: {describe(batch)}.")
    whole = structure(batch)
    columns = [_split(leaf, microbatches) for leaf in whole.flatten(batch)]
    return [whole.unflatten([column[number] for column in columns]) for number in range(microbatches)]


def join_microbatches(parts: Sequence[Arrays]) -> Arrays:
    """Put the microbatches' outputs together along axis 0; None if there are none."""
    if len(parts) < 2:
        return parts[0] if parts else None

    def join(*pieces: Any) -> Any:
        if not hasattr(pieces[0], "ndim") or pieces[0].ndim == 0:
            return pieces[0]
        return namespace_of(pieces[0]).concatenate(pieces)

    return map_leaves(join, *parts)


def sizes_of(targets: Sequence[Arrays]) -> list[int]:
    """Return each part's number of elements; that of a tree is the number of its first array."""
    return [next((leaf.size for leaf in leaves(part) if _is_array(leaf)), 0) for part in targets]


def _arrays(tree: Arrays, role: str) -> list[Array]:
    """List a tree's leaves that are arrays; refuse masked arrays and the like."""
    found = [leaf for leaf in leaves(tree) if _is_array(leaf)]
    for array in found:
        if problem := lost_meaning(array):
            raise UsageError(f"the {role} must be plain arrays, got {problem}.")
    return found


def _is_array(leaf: object) -> bool:
    return hasattr(leaf, "ndim") and hasattr(leaf, "dtype")


def _split(leaf: Any, microbatches: int) -> list[Any]:
    if not _is_array(leaf):
        return [leaf] * microbatches
    parts: list[Any] = namespace_of(leaf).array_split(leaf, microbatches)
    return parts
