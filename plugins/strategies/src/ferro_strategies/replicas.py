"""Replicas: that all ranks have the same model, and the same values in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ferro import ProcessGroup, UsageError

from .nn.arrays import Array
from .nn.module import Module


def check_same(
    strategy: str, module: Module, group: ProcessGroup, options: Mapping[str, object]
) -> None:
    """Compare names, shapes and dtypes of the model, and the options, over all ranks.

    Raises:
        UsageError: they differ, or a parameter is in pieces over some of these ranks, which then
            have different ones; raised on every rank, with the first fault.
    """
    mine = [f"the option {name}={value}" for name, value in options.items()]
    mine += [
        f"parameter {name!r}, {parameter.data.dtype} {parameter.data.shape}"
        + ("" if parameter.requires_grad else ", frozen")
        for name, parameter in module.named_parameters()
    ]
    mine += [
        f"buffer {name!r}, {buffer.data.dtype} {buffer.data.shape}"
        for name, buffer in module.named_buffers()
    ]
    told: list[tuple[list[str], list[str]]] = group.all_gather_object((_torn(module, group), mine))
    for torn, _ in told:
        if torn:
            raise UsageError(
                f"{strategy} on group {group.name!r}: parameter {torn[0]!r} is in pieces over "
                "ranks of this group, so each has another piece, not a replica. Take another axis "
                'of the mesh: DDP(model, mesh["dp"]). Nothing was changed.',
                group=group.name,
                rank=group.rank,
            )
    everyones = [lines for _, lines in told]
    longest = max(len(lines) for lines in everyones)
    for position in range(longest):
        said = [lines[position] if position < len(lines) else "nothing more" for lines in everyones]
        for rank, line in enumerate(said):
            if line != said[0]:
                raise UsageError(
                    f"{strategy} on group {group.name!r}: the models differ: where rank 0 has "
                    f"{said[0]}, rank {rank} has {line}. Build the same model, with the same "
                    "options, on every rank. Nothing was changed.",
                    group=group.name,
                    rank=group.rank,
                    peer=rank if group.rank == 0 else 0,
                )


def broadcast_arrays(
    group: ProcessGroup, arrays: Iterable[Array], root: int, chunk_bytes: int
) -> None:
    """Give every rank the root's values, in place.

    Small arrays travel together, through memory of at most `chunk_bytes`; larger ones alone,
    through none.
    """
    together: list[Array] = []
    filled = 0
    for array in arrays:
        if together and filled + array.nbytes > chunk_bytes:
            _broadcast_together(group, together, root)
            together, filled = [], 0
        together.append(array)
        filled += array.nbytes
    _broadcast_together(group, together, root)


def _broadcast_together(group: ProcessGroup, arrays: list[Array], root: int) -> None:
    if len(arrays) == 1:
        group.broadcast(arrays[0], root, out=arrays[0])
        return
    with group.coalesce() as calls:
        for array in arrays:
            calls.broadcast(array, root, out=array)


def _torn(module: Module, group: ProcessGroup) -> list[str]:
    """Name the parameters of which another rank of the group has another piece."""
    others = {*group.global_ranks} - {group.global_ranks[group.rank]}
    return [
        name
        for name, parameter in module.named_parameters()
        if any(others & {*split.group.global_ranks} for split in parameter.splits)
    ]
