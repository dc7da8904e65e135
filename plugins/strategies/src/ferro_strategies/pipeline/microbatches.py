"""Microbatches: cutting a batch, and what each part weighs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

from ferro import UsageError

from ..nn.arrays import Array, namespace_of

# A whole batch, to be cut along axis 0, or its microbatches.
Batch: TypeAlias = Array | Sequence[Array]


def cut(batch: Batch | None, microbatches: int, what: str) -> list[Array]:
    """Return the microbatches of a batch: those given, or parts as `numpy.array_split` cuts.

    Args:
        batch: (rows, …), or a sequence of as many arrays as there are microbatches, of any
            shapes. With fewer rows than microbatches, the last parts have none.
        microbatches: how many.
        what: "inputs" or "targets", for messages.

    Raises:
        UsageError: there is no batch, it cannot be cut, or has another number of parts.
    """
    if batch is None:
        raise UsageError(f"this rank has the stage that takes the {what}, and got None. Pass them.")
    if isinstance(batch, list | tuple):
        if len(batch) != microbatches:
            raise UsageError(
                f"the {what} are a sequence of {len(batch)} arrays, where microbatches="
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
        raise UsageError(f"the {what} are a single number, which has no rows to cut.")
    pieces: list[Array] = xp.array_split(whole, microbatches)
    return pieces


def shares(targets: Sequence[Array]) -> list[float]:
    """Return each part's share of all elements: the weight of its mean in the mean of all."""
    total = sum(part.size for part in targets)
    return [part.size / total if total else 0.0 for part in targets]
