"""MeshLayout: the rank at each coordinate of a mesh, without process groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ferro import UsageError

Ranks = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeshLayout:
    """Ranks in an n-dimensional array whose axes have names.

    Attributes:
        names: names of the axes.
        ranks: the rank at each coordinate, all different; read-only.
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
        at, shape = tuple(coordinates), self.ranks.shape
        fits = len(at) == len(shape)
        if not fits or not all(0 <= index < size for index, size in zip(at, shape, strict=True)):
            raise UsageError(
                f"DeviceMesh: there is no place {at} in a mesh of shape {shape}. Give one "
                "coordinate for each axis, from 0 to its size - 1."
            )
        return int(self.ranks[at])

    def coordinates_of(self, rank: int) -> tuple[int, ...] | None:
        """Return a rank's coordinates; None when it is not in the mesh."""
        found = np.argwhere(self.ranks == rank)
        return tuple(found[0].tolist()) if len(found) else None

    def ranks_along(self, axis: int, coordinates: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ranks that differ from `coordinates` on `axis` only, in order."""
        along = np.moveaxis(self.ranks, axis, -1)
        return tuple(along[coordinates[:axis] + coordinates[axis + 1 :]].tolist())

    def submesh(self, axes: Sequence[str], coordinates: tuple[int, ...]) -> MeshLayout:
        """Return the layout of `axes`, in this order, with the other coordinates fixed."""
        kept = self._distinct(axes)
        key = tuple(slice(None) if axis in kept else coordinates[axis] for axis in range(self.ranks.ndim))
        ranks = np.transpose(self.ranks[key], np.argsort(np.argsort(kept)))
        return MeshLayout(names=tuple(axes), ranks=ranks)

    def flatten(self, axes: Sequence[str], name: str) -> MeshLayout:
        """Merge `axes` into one axis, in which the first of them varies slowest.

        The new axis takes the position of the foremost of them.
        """
        merged = self._distinct(axes)
        position = min(merged)
        rest = [axis for axis in range(self.ranks.ndim) if axis not in merged]
        before, after = rest[:position], rest[position:]
        names = (*(self.names[axis] for axis in before), name, *(self.names[axis] for axis in after))
        check_names(names, len(names))
        sizes = [self.ranks.shape[axis] for axis in before]
        sizes.append(math.prod(self.ranks.shape[axis] for axis in merged))
        sizes += [self.ranks.shape[axis] for axis in after]
        ordered = np.transpose(self.ranks, (*before, *merged, *after))
        return MeshLayout(names=names, ranks=ordered.reshape(sizes))

    def describe(self) -> list[object]:
        """Return names, shape and ranks as plain values, which ranks can exchange and compare."""
        return [list(self.names), list(self.ranks.shape), self.ranks.ravel().tolist()]

    def picture(self, own_rank: int) -> str:
        """Draw a table for each coordinate on the axes before the last two.

        pp 0
              tp 0  tp 1
        dp 0    0     1
        dp 1   [2]    3        own_rank is 2
        """
        names, shape = self.names, self.ranks.shape
        if len(shape) == 1:
            names, shape = ("", *names), (1, *shape)
        *outer_names, row_name, column_name = names
        *outer, rows, columns = shape
        row_heads = [f"{row_name} {row}" if row_name else "" for row in range(rows)]
        heads = [f"{column_name} {column}" for column in range(columns)]
        cells = {rank: f"[{rank}]" if rank == own_rank else f"{rank} " for rank in self.ranks.flat}
        width = 2 + max(map(len, (*heads, *cells.values())))
        margin = max(map(len, row_heads))
        tables = self.ranks.reshape(shape)

        def lines() -> Iterator[str]:
            for at in np.ndindex(*outer):
                if at:
                    pairs = zip(outer_names, at, strict=True)
                    yield ", ".join(f"{name} {index}" for name, index in pairs)
                yield " " * margin + "".join(head.rjust(width) for head in heads)
                for head, row in zip(row_heads, tables[at], strict=True):
                    line = head.ljust(margin) + "".join(cells[rank].rjust(width) for rank in row)
                    yield line.rstrip()

        return "\n".join(lines())

    def _distinct(self, axes: Sequence[str]) -> tuple[int, ...]:
        if isinstance(axes, str) or not axes or len(set(axes)) != len(axes):
            raise UsageError(
                f"DeviceMesh: {axes!r} does not name axes. Give a tuple of different ones out of "
                f"{', '.join(self.names)}."
            )
        return tuple(self.axis(axis) for axis in axes)


def mesh_layout(shape: Sequence[int] | npt.NDArray[np.integer], names: Sequence[str], world_size: int) -> MeshLayout:
    """Check the arguments of DeviceMesh and lay out the ranks of a group of `world_size`.

    Raises:
        UsageError: shape, names or ranks do not make a mesh.
    """
    if isinstance(shape, np.ndarray):
        check_names(names, shape.ndim)
        _check_sizes(shape.shape, names)
        ranks = _checked_ranks(shape, world_size)
    else:
        integers = (int, np.integer)
        if not isinstance(shape, Sequence) or not all(isinstance(n, integers) and n is not True for n in shape):
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
    return MeshLayout(names=tuple(names), ranks=ranks)


def check_names(names: Sequence[str], ndim: int) -> None:
    """Check that there is a name for each of `ndim` axes, and that all names differ.

    Raises:
        UsageError: a name is missing, empty, double or no string, or there is no axis.
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
        raise UsageError(f"DeviceMesh: there is no rank {wrong[0]}; the group has 0 to {world_size - 1}.")
    found, times = np.unique(ranks, return_counts=True)
    if (times > 1).any():
        raise UsageError(f"DeviceMesh: rank {found[times > 1][0]} stands in more than one place.")
    return ranks.astype(np.int64)  # always a copy
