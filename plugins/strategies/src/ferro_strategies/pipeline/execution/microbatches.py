"""Microbatches: splitting a batch into them, and the weight of each in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

from ferro import UsageError

from ...nn.arrays import Array, namespace_of

# A whole batch, to be split along axis 0, or its microbatches.
Batch: TypeAlias = Array | Sequence[Array]


def split_batch(batch: Batch | None, microbatches: int, role: str) -> list[Array]:
    """Return the microbatches of a batch: the given ones, or the parts by `numpy.array_split`.

    Args:
        batch: (rows, …), or a sequence of as many arrays as there are microbatches, of any
            shapes. With fewer rows than microbatches, the last parts have none.
        microbatches: number of parts.
        role: "inputs" or "targets", for error messages.

    Raises:
        UsageError: there is no batch, it cannot be split, or it has another number of parts.
    """
    if batch is None:
        raise UsageError(f"this rank has the stage that takes the {role}, and got None. Pass them.")
    if isinstance(batch, list | tuple):
        if len(batch) != microbatches:
            raise UsageError(
                f"the {role} are a sequence of {len(batch)} arrays, where microbatches="
                f"{microbatches}. Pass one array for each, or one to be cut; or, on every rank, "
                f"microbatches={len(batch)}: to forward, or to Pipeline for step."
            )
        parts: list[Array] = list(batch)
        for part in parts:
            namespace_of(part)
        return parts
    whole = cast(Array, batch)
    xp = namespace_of(whole)
    if whole.ndim == 0:
        raise UsageError(f"the {role} are a single number, which has no rows to cut.")
    pieces: list[Array] = xp.array_split(whole, microbatches)
    return pieces


def loss_weights(targets: Sequence[Array]) -> list[float]:
    """Return each part's share of all elements: the weight of its mean in the total mean."""
    total = sum(part.size for part in targets)
    return [part.size / total if total else 0.0 for part in targets]
