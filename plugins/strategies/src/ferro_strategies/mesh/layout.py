"""Layout: which rank stands where in a mesh. Arithmetic alone: no groups, no communication."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ferro import UsageError

Ranks = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """Ranks in an n-dimensional array whose axes have names.

    Attributes:
        names: of the axes.
        ranks: read-only; every element another rank.
    """

    names: tuple[str, ...]
    ranks: Ranks

    def __post_init__(self) -> None:
        self.ranks.setflags(write=False)

    def axis(self, axis: str | int) -> int:
        """Return an axis's number.

        Raises:
            UsageError: there is no such axis.
        """
        if isinstance(axis, str):
            if axis in self.names:
                return self.names.index(axis)
        elif 0 <= axis < len(self.names):
            return axis
        raise UsageError(
            f"DeviceMesh: there is no axis {axis!r}. The axes are {', '.join(self.names)}, "
            f"or 0 to {len(self.names) - 1}."
        )

    def rank_of(self, coordinates: Sequence[int]) -> int:
        """Return the rank at `coordinates`, one for each axis, counted from 0.

        Raises:
            UsageError: they are outside the mesh, or not one for each axis.
        """
        place, shape = tuple(coordinates), self.ranks.shape
        fits = len(place) == len(shape)
        if not fits or not all(0 <= at < size for at, size in zip(place, shape, strict=True)):
            raise UsageError(
                f"DeviceMesh: there is no place {place} in a mesh of shape {shape}. Give one "
                "coordinate for each axis, from 0 to its size - 1."
            )
        return int(self.ranks[place])

    def find(self, rank: int) -> tuple[int, ...] | None:
        """Return a rank's coordinates; None when it is not in the mesh."""
        places = np.argwhere(self.ranks == rank)
        return tuple(places[0].tolist()) if len(places) else None

    def line(self, axis: int, place: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ranks along `axis` through `place`, by their coordinate on it."""
        along = np.moveaxis(self.ranks, axis, -1)
        return tuple(along[place[:axis] + place[axis + 1 :]].tolist())

    def part(self, axes: Sequence[str], place: tuple[int, ...]) -> Layout:
        """Return the part that spans `axes`, in the order asked, through `place`."""
        kept = self._distinct(axes)
        through = tuple(slice(None) if at in kept else place[at] for at in range(self.ranks.ndim))
        part = np.transpose(self.ranks[through], np.argsort(np.argsort(kept)))
        return Layout(names=tuple(axes), ranks=part)

    def flatten(self, axes: Sequence[str], name: str) -> Layout:
        """Return the same ranks with `axes` made one, the first of them slowest.

        It stands where the foremost of them stood.
        """
        joined = self._distinct(axes)
        at = min(joined)
        rest = [axis for axis in range(self.ranks.ndim) if axis not in joined]
        before, after = rest[:at], rest[at:]
        names = (
            *(self.names[axis] for axis in before),
            name,
            *(self.names[axis] for axis in after),
        )
        check_names(names, len(names))
        sizes = [self.ranks.shape[axis] for axis in before]
        sizes.append(math.prod(self.ranks.shape[axis] for axis in joined))
        sizes += [self.ranks.shape[axis] for axis in after]
        ordered = np.transpose(self.ranks, (*before, *joined, *after))
        return Layout(names=names, ranks=ordered.reshape(sizes))

    def describe(self) -> list[object]:
        """Return all of it in plain values, which ranks can compare."""
        return [list(self.names), list(self.ranks.shape), self.ranks.ravel().tolist()]

    def _distinct(self, axes: Sequence[str]) -> tuple[int, ...]:
        if isinstance(axes, str) or not axes or len(set(axes)) != len(axes):
            raise UsageError(
                f"DeviceMesh: {axes!r} does not name axes. Give a tuple of different ones out of "
                f"{', '.join(self.names)}."
            )
        return tuple(self.axis(axis) for axis in axes)


def arrange(
    shape: Sequence[int] | npt.NDArray[np.integer], names: Sequence[str], world_size: int
) -> Layout:
    """Lay out ranks 0 to `world_size` - 1 as asked; see `DeviceMesh`.

    Raises:
        UsageError: shape, names or ranks do not make a mesh.
    """
    if isinstance(shape, np.ndarray):
        check_names(names, shape.ndim)
        _check_sizes(shape.shape, names)
        ranks = _checked_ranks(shape, world_size)
    else:
        integers = (int, np.integer)
        if not isinstance(shape, Sequence) or not all(isinstance(n, integers) for n in shape):
            raise UsageError(
                f"DeviceMesh: shape must be a tuple of integers, not {shape!r}. To say which rank "
                "stands where, give a NumPy array of ranks."
            )
        sizes = tuple(shape)
        check_names(names, len(sizes))
        _check_sizes(sizes, names)
        if math.prod(sizes) != world_size:
            raise UsageError(
                f"DeviceMesh: shape {sizes} has room for {math.prod(sizes)} ranks, but the group "
                f"has {world_size}. Give another shape, or a NumPy array of the ranks wanted."
            )
        ranks = np.arange(world_size, dtype=np.int64).reshape(sizes)
    return Layout(names=tuple(names), ranks=ranks)


def check_names(names: Sequence[str], ndim: int) -> None:
    """Refuse axes that are none, unnamed, or named alike.

    Raises:
        UsageError: names the axes.
    """
    if ndim == 0:
        raise UsageError("DeviceMesh: a mesh needs at least one axis, got an empty shape.")
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise UsageError(f"DeviceMesh: names must be a tuple of strings, not {names!r}.")
    if len(names) != ndim:
        raise UsageError(f"DeviceMesh: {len(names)} names, {names!r}, for {ndim} axes.")
    if len(set(names)) != len(names):
        raise UsageError(f"DeviceMesh: the names {names!r} are not all different.")


def _check_sizes(sizes: tuple[int, ...], names: Sequence[str]) -> None:
    for name, size in zip(names, sizes, strict=True):
        if size < 1:
            raise UsageError(f"DeviceMesh: axis {name!r} has size {size}; it needs 1 at least.")


def _checked_ranks(ranks: npt.NDArray[np.integer], world_size: int) -> Ranks:
    if ranks.dtype.kind not in "iu":
        raise UsageError(f"DeviceMesh: an array of ranks holds integers, not {ranks.dtype}.")
    wrong = ranks[(ranks < 0) | (ranks >= world_size)]
    if wrong.size:
        raise UsageError(
            f"DeviceMesh: there is no rank {wrong[0]}; the group has 0 to {world_size - 1}."
        )
    found, times = np.unique(ranks, return_counts=True)
    if (times > 1).any():
        raise UsageError(f"DeviceMesh: rank {found[times > 1][0]} stands in more than one place.")
    return ranks.astype(np.int64)  # always a copy
