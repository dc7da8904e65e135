"""CheckpointPiece: the elements of a whole array that this rank holds, for a program that saves and loads checkpoints.

Such a program finds it by its attributes, and imports nothing from here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ferro.errors import UsageError

from .arrays import Array
from .parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPiece:
    """A box of a whole array, or consecutive elements of the flattened box, as one rank holds them.

    Every element of the array is held by a rank. Where several ranks hold it, they have the same value.

    Attributes:
        shape: of the whole array.
        data: this rank's elements in C order, not a copy. A load writes into it.
        start: the box's first index in each dimension.
        extent: the box's size in each dimension.
        flat: the first of the flattened box's elements that this rank holds, and their number; None: all of them.
        replicas_may_differ: whether ranks that hold the same elements may have other values, of which those of the
            lowest rank count.
        on_all_ranks: whether all ranks know the array's name; False for a part of a model that only some ranks have.
    """

    shape: tuple[int, ...]
    data: Array
    start: tuple[int, ...]
    extent: tuple[int, ...]
    flat: tuple[int, int] | None = None
    replicas_may_differ: bool = False
    on_all_ranks: bool = True

    @classmethod
    def whole(cls, data: Array, *, replicas_may_differ: bool = False, on_all_ranks: bool = True) -> CheckpointPiece:
        """Describe an array of which this rank holds everything."""
        return cls(
            shape=data.shape,
            data=data,
            start=(0,) * data.ndim,
            extent=data.shape,
            replicas_may_differ=replicas_may_differ,
            on_all_ranks=on_all_ranks,
        )


def piece_like_parameter(parameter: Parameter, data: Array) -> CheckpointPiece:
    """Place an array that is cut as a parameter is, such as its value or a moment of its gradient.

    Args:
        parameter: its splits say where its piece lies.
        data: an array of the shape that the parameter holds on this rank.

    Raises:
        UsageError: a strategy that has split the parameter does not say where this rank's piece lies.
    """
    on_all_ranks = parameter.stages is None
    splits = parameter.splits
    if not splits:
        return CheckpointPiece.whole(data, on_all_ranks=on_all_ranks)
    *cuts, last = splits
    if last.dim is not None:
        cuts.append(last)
    shape, extent = splits[0].shape, last.shape if last.dim is None else data.shape
    if shape is None or extent is None or any(split.start is None for split in splits):
        raise UsageError(
            f"the place of this rank's piece of parameter {parameter.name!r} is not known. The strategy that has split "
            "it must give Split(shape=..., start=...)."
        )
    start = [0] * len(shape)
    for split in cuts:
        if split.dim is None or split.start is None or len(extent) != len(shape):
            raise UsageError(
                f"parameter {parameter.name!r} was cut again after it had been cut as a flat row, so its pieces lie in "
                "no boxes. Let the strategy that makes flat rows, such as FSDP, wrap the model last."
            )
        start[split.dim] += split.start
    return CheckpointPiece(
        shape=shape,
        data=data,
        start=tuple(start),
        extent=extent,
        flat=(last.start, data.size) if last.dim is None and last.start is not None else None,
        on_all_ranks=on_all_ranks,
    )
