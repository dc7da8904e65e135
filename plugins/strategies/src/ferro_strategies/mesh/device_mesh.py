"""DeviceMesh: ranks on named axes, with a process group along each axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn, Self, overload

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, UsageError

from .layout import MeshLayout, Ranks, mesh_layout


class DeviceMesh:
    """Ranks arranged in an n-dimensional array with named axes.

    mesh = DeviceMesh((2, 4), ("dp", "tp"), group)  # rank 6 has dp=1, tp=2
    mesh["tp"]                                      # its group of ranks 4, 5, 6, 7
    mesh["dp"]                                      # its group of ranks 2, 6

    Along each axis a rank has the group of the ranks whose other coordinates are the same as its
    own. The rank in that group is the coordinate on the axis. All groups of an axis have the same
    name ("world.dp"). Closing the parent group closes them.

    All ranks of `group` construct a mesh together, also ranks that the mesh leaves out.

    Args:
        shape: sizes of the axes; ranks are laid out in order, the last axis fastest. Or a NumPy
            array of integers: the rank at each coordinate. The array may leave ranks out.
        names: names of the axes, all different.
        group: the parent group; every rank of the mesh is a rank of this group.

    Attributes:
        names: names of the axes.
        shape: size of each axis.
        ndim: number of axes.
        size: number of ranks in the mesh.
        ranks: the rank at each coordinate, an int64 array of `shape`, read-only.
        coordinates: this rank's coordinates; None when it is not in the mesh.
        parent: the parent group.

    Raises:
        UsageError: shape and names do not make a mesh of this group; nothing was sent. Or the
            ranks gave different arguments; then every rank raises it.
    """

    def __init__(
        self, shape: Sequence[int] | npt.NDArray[np.integer], names: Sequence[str], group: ProcessGroup
    ) -> None:
        layout = mesh_layout(shape, names, group.world_size)
        _check_same_layout(layout, group)
        self._set_layout(layout, group, {})

    def _set_layout(self, layout: MeshLayout, parent: ProcessGroup, existing: Mapping[str, ProcessGroup]) -> None:
        """Set the attributes, and make the groups of the axes that `existing` does not name."""
        self.names = layout.names
        self.shape: tuple[int, ...] = layout.ranks.shape
        self.ndim = layout.ranks.ndim
        self.size = layout.ranks.size
        self.ranks: Ranks = layout.ranks
        self.coordinates = layout.coordinates_of(parent.rank)
        self.parent = parent
        self._layout = layout
        self._groups: dict[str, ProcessGroup] = {}
        self._created_groups: list[ProcessGroup] = []
        if self.coordinates is None:
            return
        # All ranks make the groups in the order of the axes, and the groups of one axis are
        # disjoint. Therefore no two ranks wait for each other.
        for axis, name in enumerate(self.names):
            if name in existing:
                self._groups[name] = existing[name]
                continue
            ranks = layout.ranks_along(axis, self.coordinates)
            self._groups[name] = parent.subgroup(ranks, name=f"{parent.name}.{name}")
            self._created_groups.append(self._groups[name])

    @overload
    def __getitem__(self, axes: str) -> ProcessGroup: ...
    @overload
    def __getitem__(self, axes: tuple[str, ...]) -> DeviceMesh: ...
    def __getitem__(self, axes: str | tuple[str, ...]) -> ProcessGroup | DeviceMesh:
        """Return the group along one axis, or the submesh of several axes.

        mesh["dp", "tp"] holds the ranks whose coordinates differ from this rank's on these axes
        only. Its axes are in this order, and it shares their groups. Communicates nothing.

        Raises:
            UsageError: there are no such axes, or this rank is not in the mesh.
        """
        if isinstance(axes, tuple):
            layout = self._layout.submesh(axes, self._own_coordinates("slice the mesh"))
            return self._derived(layout, self._groups)
        return self.group(axes)

    def group(self, axis: str | int) -> ProcessGroup:
        """Return this rank's group along one axis, given by name or number.

        Raises:
            UsageError: there is no such axis, or this rank is not in the mesh.
        """
        name = self.names[self._layout.axis(axis)]
        self._own_coordinates(f"have a group along {name!r}")
        return self._groups[name]

    def flatten(self, axes: Sequence[str], name: str) -> DeviceMesh:
        """Return a mesh in which several axes are merged into one, which gets new groups.

        The first of `axes` varies slowest in the merged axis, which takes the position of the
        foremost of them. The other axes keep their groups. All ranks of this mesh call it.

        Raises:
            UsageError: there are no such axes, or another has the name already.
        """
        kept = {axis: group for axis, group in self._groups.items() if axis not in axes}
        return self._derived(self._layout.flatten(axes, name), kept)

    def rank_of(self, coordinates: Sequence[int]) -> int:
        """Return the rank at `coordinates`, one for each axis, counted from 0.

        Raises:
            UsageError: they are outside the mesh, or not one for each axis.
        """
        return self._layout.rank_of(coordinates)

    def coordinates_of(self, rank: int) -> tuple[int, ...]:
        """Return a rank's coordinates.

        Raises:
            UsageError: the rank is not in the mesh.
        """
        found = self._layout.coordinates_of(rank)
        if found is None:
            raise UsageError(f"DeviceMesh: rank {rank} is not in {self!r}.")
        return found

    def picture(self) -> str:
        """Draw the ranks as a table, with this rank in brackets."""
        return self._layout.picture(self.parent.rank)

    def close(self) -> None:
        """Close the groups that were made for this mesh, but no shared ones. Idempotent."""
        for group in self._created_groups:
            group.close()

    def __copy__(self) -> DeviceMesh:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> DeviceMesh:
        """Return the mesh itself, whose groups have connections that are not copied."""
        return self

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            f"{self!r} cannot be pickled, because its groups have connections. Save its shape and names, and make "
            "a mesh of them where they are loaded.",
            group=self.parent.name,
            rank=self.parent.rank,
        )

    def __repr__(self) -> str:
        sizes = zip(self.names, self.shape, strict=True)
        axes = ", ".join(f"{name}={size}" for name, size in sizes)
        where = "not in it"
        if self.coordinates is not None:
            coordinates = zip(self.names, self.coordinates, strict=True)
            where = "at " + ", ".join(f"{name}={index}" for name, index in coordinates)
        parent = self.parent
        return f"<DeviceMesh {axes} of group {parent.name!r}, rank {parent.rank} {where}>"

    def _derived(self, layout: MeshLayout, existing: Mapping[str, ProcessGroup]) -> Self:
        mesh = type(self).__new__(type(self))
        mesh._set_layout(layout, self.parent, existing)
        return mesh

    def _own_coordinates(self, purpose: str) -> tuple[int, ...]:
        if self.coordinates is None:
            raise UsageError(
                f"DeviceMesh: rank {self.parent.rank} of group {self.parent.name!r} cannot {purpose}: "
                f"it is not among the mesh's ranks, {self.ranks.ravel().tolist()}. Ask "
                "`mesh.coordinates is not None` first.",
                group=self.parent.name,
                rank=self.parent.rank,
            )
        return self.coordinates


def _check_same_layout(layout: MeshLayout, group: ProcessGroup) -> None:
    layouts = group.all_gather_object(layout.describe())
    first = layouts[0]
    for rank, (names, shape, ranks) in enumerate(layouts):
        if [names, shape, ranks] != first:
            raise UsageError(
                f"DeviceMesh on group {group.name!r}: the ranks gave different meshes: rank 0 has "
                f"axes {first[0]} of shape {first[1]} with ranks {first[2]}, rank {rank} has axes "
                f"{names} of shape {shape} with ranks {ranks}. Give the same on every rank.",
                group=group.name,
                rank=group.rank,
                peer=rank if group.rank == 0 else 0,
            )
