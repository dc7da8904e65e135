"""DeviceMesh: named axes of ranks, and the process group along each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self, overload

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, UsageError

from .layout import Layout, Ranks, arrange
from .picture import picture


class DeviceMesh:
    """Ranks arranged in an n-dimensional array with named axes.

    mesh = DeviceMesh((2, 4), ("dp", "tp"), group)  # rank 6 is at dp=1, tp=2
    mesh["tp"]                                      # its group of ranks 4, 5, 6, 7
    mesh["dp"]                                      # its group of ranks 2, 6

    Along each axis every rank has a group of its own: the line of ranks through its place. The
    rank in that group is the coordinate on that axis. Groups of one axis have one name
    ("world.dp"), and are closed with the group they were made from.

    All ranks of `group` construct a mesh together, also those that are not in it.

    Args:
        shape: sizes of the axes; ranks are laid out in rows, the last axis fastest. Or a NumPy
            array of integers that says which rank stands where, and may leave ranks out.
        names: of the axes, all different.
        group: the ranks to choose from; a rank here is a rank in it.

    Attributes:
        names: as given.
        shape: size of each axis.
        ndim: number of axes.
        size: number of ranks in the mesh.
        ranks: which rank stands where, of `shape`, int64, read-only.
        coordinates: this rank's place; None when it is not in the mesh.
        parent: the group it was made from.

    Raises:
        UsageError: shape and names do not make a mesh of this group; nothing was sent. Or ranks
            gave different ones: raised on every rank.
    """

    def __init__(
        self,
        shape: Sequence[int] | npt.NDArray[np.integer],
        names: Sequence[str],
        group: ProcessGroup,
    ) -> None:
        layout = arrange(shape, names, group.world_size)
        _check_agreed(layout, group)
        self._lay(layout, group, {})

    def _lay(self, layout: Layout, parent: ProcessGroup, known: Mapping[str, ProcessGroup]) -> None:
        """Take a layout, and make the groups that are not known."""
        self.names = layout.names
        self.shape: tuple[int, ...] = layout.ranks.shape
        self.ndim = layout.ranks.ndim
        self.size = layout.ranks.size
        self.ranks: Ranks = layout.ranks
        self.coordinates = layout.find(parent.rank)
        self.parent = parent
        self._layout = layout
        self._groups: dict[str, ProcessGroup] = {}
        self._made: list[ProcessGroup] = []
        if self.coordinates is None:
            return
        # All ranks go through the axes in one order, and the lines along an axis are disjoint, so
        # nobody waits for a rank that waits for him.
        for axis, name in enumerate(self.names):
            if name in known:
                self._groups[name] = known[name]
                continue
            line = layout.line(axis, self.coordinates)
            made = parent.subgroup(line, name=f"{parent.name}.{name}")
            self._groups[name] = made
            self._made.append(made)

    @overload
    def __getitem__(self, axes: str) -> ProcessGroup: ...
    @overload
    def __getitem__(self, axes: tuple[str, ...]) -> DeviceMesh: ...
    def __getitem__(self, axes: str | tuple[str, ...]) -> ProcessGroup | DeviceMesh:
        """Return the group along one axis, or the mesh of several.

        mesh["dp", "tp"] holds the ranks whose places differ from this one's on these axes only,
        with the axes in the order asked and the groups they have here. Communicates nothing.

        Raises:
            UsageError: there are no such axes, or this rank is not in the mesh.
        """
        if isinstance(axes, tuple):
            part = self._layout.part(axes, self._place("slice the mesh"))
            return self._derived(part, self._groups)
        return self.group(axes)

    def group(self, axis: str | int) -> ProcessGroup:
        """Return this rank's group along one axis, given by name or number.

        Raises:
            UsageError: there is no such axis, or this rank is not in the mesh.
        """
        name = self.names[self._layout.axis(axis)]
        self._place(f"have a group along {name!r}")
        return self._groups[name]

    def flatten(self, axes: Sequence[str], name: str) -> DeviceMesh:
        """Return the mesh in which several axes are one, with a group made for it.

        Its ranks run over `axes` in the order given, the first slowest; it stands where the
        foremost of them stood. The other axes keep their groups. All ranks of this mesh call it.

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
        """Return where a rank stands.

        Raises:
            UsageError: it is not in the mesh.
        """
        found = self._layout.find(rank)
        if found is None:
            raise UsageError(f"DeviceMesh: rank {rank} is not in {self!r}.")
        return found

    def picture(self) -> str:
        """Draw who stands where, for people; this rank is in brackets."""
        return picture(self._layout, self.parent.rank)

    def close(self) -> None:
        """Close the groups that were made for this mesh, not those it shares. Idempotent."""
        for group in self._made:
            group.close()

    def __repr__(self) -> str:
        sizes = zip(self.names, self.shape, strict=True)
        axes = ", ".join(f"{name}={size}" for name, size in sizes)
        where = "not in it"
        if self.coordinates is not None:
            places = zip(self.names, self.coordinates, strict=True)
            where = "at " + ", ".join(f"{name}={at}" for name, at in places)
        parent = self.parent
        return f"<DeviceMesh {axes} of group {parent.name!r}, rank {parent.rank} {where}>"

    def _derived(self, layout: Layout, known: Mapping[str, ProcessGroup]) -> Self:
        mesh = type(self).__new__(type(self))
        mesh._lay(layout, self.parent, known)
        return mesh

    def _place(self, wish: str) -> tuple[int, ...]:
        if self.coordinates is None:
            raise UsageError(
                f"DeviceMesh: rank {self.parent.rank} of group {self.parent.name!r} cannot {wish}: "
                f"it is not among the mesh's ranks, {self.ranks.ravel().tolist()}. Ask "
                "`mesh.coordinates is not None` first.",
                group=self.parent.name,
                rank=self.parent.rank,
            )
        return self.coordinates


def _check_agreed(layout: Layout, group: ProcessGroup) -> None:
    everyones = group.all_gather_object(layout.describe())
    for rank, (names, shape, ranks) in enumerate(everyones):
        if [names, shape, ranks] != everyones[0]:
            first = everyones[0]
            raise UsageError(
                f"DeviceMesh on group {group.name!r}: the ranks gave different meshes: rank 0 has "
                f"axes {first[0]} of shape {first[1]} with ranks {first[2]}, rank {rank} has axes "
                f"{names} of shape {shape} with ranks {ranks}. Give the same on every rank.",
                group=group.name,
                rank=group.rank,
                peer=rank if group.rank == 0 else 0,
            )
