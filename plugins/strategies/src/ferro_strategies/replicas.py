"""Replicas: check that all ranks built the same model, and broadcast one rank's values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ferro import ProcessGroup, UsageError
from ferro.arrays import dtype_from_name, dtype_name

from .nn.arrays import Array
from .nn.module import Module
from .nn.state_owner import SavesState


def check_wrappable(strategy: str, module: Module, group: object) -> None:
    """Check that a strategy is given a module that it can wrap, and a group.

    Raises:
        UsageError: an argument is something else, or the module, or a part of it, is wrapped already by a strategy that
            averages gradients.
    """
    check_module_and_group(strategy, module, group)
    for name, part in module.named_modules():
        if getattr(type(part), "averages_gradients", False):
            place = f"its part {name!r} is" if name else "it is"
            raise UsageError(
                f"{strategy}: {type(module).__name__} cannot be wrapped, for {place} a {type(part).__name__}, which "
                "averages the gradients already. Wrap each parameter once: the whole model, or its parts next to each "
                "other. (For copies of a sharded model on further ranks, see FSDP's HYBRID_SHARD.)"
            )


def check_module_and_group(strategy: str, module: object, group: object) -> None:
    """Check that a strategy is given a module and a group, in this order.

    Raises:
        UsageError: an argument is something else.
    """
    if not isinstance(module, Module):
        raise UsageError(f"{strategy} takes a module and a process group, got a {type(module).__name__} first.")
    if not isinstance(group, ProcessGroup):
        raise UsageError(
            f"{strategy} takes a module and a process group, got a {type(group).__name__} second. Give it what "
            f"ferro.init() returned, or an axis of a mesh: {strategy}(model, group)."
        )


def check_same(strategy: str, module: Module, group: ProcessGroup, options: Mapping[str, object]) -> None:
    """Compare names, shapes and dtypes of the model, and the options, over all ranks.

    Raises:
        UsageError: models or options differ, or a parameter is split over ranks of the group,
            which therefore hold different values; raised on every rank, with the first fault.
    """
    own_lines = [f"the option {name}={value}" for name, value in options.items()]
    own_lines += [
        f"parameter {name!r}, {parameter.dtype} {parameter.shape}" + ("" if parameter.requires_grad else ", frozen")
        for name, parameter in module.named_parameters()
    ]
    own_lines += [
        f"for parameter {name!r} the state {described}"
        for name, parameter in module.named_parameters()
        for described in sorted(owner.describe_state(parameter) for owner in parameter.state_owners)
    ]
    own_lines += [
        f"buffer {name!r}, {buffer.data.dtype} {buffer.data.shape}" for name, buffer in module.named_buffers()
    ]
    gathered: list[tuple[list[str], list[str]]] = group.all_gather_object((_split_over(module, group), own_lines))
    for split, _ in gathered:
        if split:
            raise UsageError(
                f"{strategy} on group {group.name!r}: parameter {split[0]!r} is in pieces over "
                "ranks of this group, so each has another piece, not a replica. Take another axis "
                'of the mesh: DDP(model, mesh["dp"]). Nothing was changed.',
                group=group.name,
                rank=group.rank,
            )
    by_rank = [lines for _, lines in gathered]
    longest = max(len(lines) for lines in by_rank)
    for position in range(longest):
        found = [lines[position] if position < len(lines) else "nothing more" for lines in by_rank]
        for rank, line in enumerate(found):
            if line != found[0]:
                raise UsageError(
                    f"{strategy} on group {group.name!r}: the models differ: where rank 0 has "
                    f"{found[0]}, rank {rank} has {line}. Build the same model, with the same "
                    "options and the same state of optimizers, on every rank. Nothing was changed.",
                    group=group.name,
                    rank=group.rank,
                    peer=rank if group.rank == 0 else 0,
                )


def broadcast_arrays(group: ProcessGroup, arrays: Iterable[Array], root: int, chunk_bytes: int) -> None:
    """Broadcast the root's values into the arrays of all ranks.

    Small arrays are sent together through a buffer of at most `chunk_bytes`; a larger array is sent
    alone, without a buffer.
    """
    chunk: list[Array] = []
    filled = 0
    for array in arrays:
        if chunk and filled + array.nbytes > chunk_bytes:
            _broadcast_coalesced(group, chunk, root)
            chunk, filled = [], 0
        chunk.append(array)
        filled += array.nbytes
    _broadcast_coalesced(group, chunk, root)


def _broadcast_coalesced(group: ProcessGroup, arrays: list[Array], root: int) -> None:
    if len(arrays) == 1:
        group.broadcast(arrays[0], root, out=arrays[0])
        return
    with group.coalesce() as calls:
        for array in arrays:
            calls.broadcast(array, root, out=array)


def copy_states(strategy: str, group: ProcessGroup, owners: Sequence[SavesState], root: int, chunk_bytes: int) -> None:
    """Give all ranks the state that one rank's optimizers, or other owners of state, have.

    Raises:
        UsageError: ranks have different owners; raised on every rank.
    """
    kinds: list[list[str]] = group.all_gather_object([type(owner).__name__ for owner in owners])
    if any(own != kinds[root] for own in kinds):
        words = "; ".join(f"rank {rank}: {', '.join(own) or 'none'}" for rank, own in enumerate(kinds))
        raise UsageError(
            f"{strategy}: ranks have different optimizers, so their states cannot be made equal ({words}). Name those "
            f"of this model on every rank: join(optimizer)."
        )
    for owner in owners:
        arrays = {name: np.asarray(array) for name, array in owner.state_dict().items()} if group.rank == root else {}
        layout = group.broadcast_object({key: (dtype_name(a.dtype), a.shape) for key, a in arrays.items()}, root)
        if group.rank != root:
            arrays = {key: np.empty(shape, dtype_from_name(dtype)) for key, (dtype, shape) in layout.items()}
        broadcast_arrays(group, arrays.values(), root, chunk_bytes)
        if group.rank != root:
            owner.load_state_dict(arrays)


def _split_over(module: Module, group: ProcessGroup) -> list[str]:
    """List the parameters of which another rank of the group holds another piece."""
    others = {*group.global_ranks} - {group.global_ranks[group.rank]}
    return [
        name
        for name, parameter in module.named_parameters()
        if any(others & {*split.group.global_ranks} for split in parameter.splits)
    ]
