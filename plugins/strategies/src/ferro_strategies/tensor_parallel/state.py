"""Conversion between the state dicts of tensor-parallel modules and of serial modules."""

from __future__ import annotations

from collections.abc import Mapping

from ferro import UsageError

from ..nn.arrays import Array
from ..nn.checks import first_few
from ..nn.module import Module
from ..nn.parameter import Parameter, Split
from .sharding import all_gather_along, all_gather_sizes, local_shard


def full_state_dict(module: Module, local: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Gather all sharded parameters; return the serial module's state dict on every rank.

    All ranks call it. Parameters and buffers that are not sharded are taken from this rank.

    Args:
        module: with tensor-parallel layers.
        local: this rank's state; by default `module.state_dict()`. Where another strategy shards the module further,
            give the state that this strategy gathers (`FSDP.full_state_dict`).

    Raises:
        UsageError: `local` is needed, or lacks a parameter.
    """
    given = _local_state(module, local)
    state = dict(given)
    for name, parameter in module.named_parameters():
        for split, dim in reversed(_sharded_dims(parameter)):
            shard = state[name]
            sizes = all_gather_sizes(shard.shape[dim], split.group, shard)
            state[name] = all_gather_along(shard, split.group, dim, sizes)
    return state


def local_state_dict(
    module: Module, state: Mapping[str, Array], local: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """Shard the state of the serial module, for this rank's `module.load_state_dict`.

    All ranks call it, with the same state.

    Args:
        module: with tensor-parallel layers.
        state: as from `full_state_dict`, or from the serial module; not modified.
        local: see `full_state_dict`; its shapes give the size of each shard.

    Returns:
        Views of the arrays given, including those that have no counterpart in the module.

    Raises:
        UsageError: `local` is needed, or a shape does not fit; nothing was changed.
    """
    given = _local_state(module, local)
    shards = dict(state)
    faults = []
    for name, parameter in module.named_parameters():
        shape = list(given[name].shape)
        divisions = []
        for split, dim in reversed(_sharded_dims(parameter)):
            sizes = all_gather_sizes(shape[dim], split.group, given[name])
            shape[dim] = sum(sizes)
            divisions.append((split, dim, sizes))
        if name in state and list(state[name].shape) != shape:
            faults.append(f"{name!r} is {tuple(shape)} whole, given {state[name].shape}")
        elif name in state:
            for split, dim, sizes in reversed(divisions):
                shards[name] = local_shard(shards[name], split.group, dim, sizes)
    if faults:
        raise UsageError(
            f"local_state_dict: the state does not fit {type(module).__name__}: "
            f"{'; '.join(first_few(faults))}. Nothing was loaded."
        )
    return shards


def load_full_state_dict(module: Module, state: Mapping[str, Array], local: Mapping[str, Array] | None = None) -> None:
    """Copy this rank's shards of the serial module's state into the parameters, in place.

    All ranks call it, with the same state.

    Args:
        module: with tensor-parallel layers; its `load_state_dict` takes arrays like `local`.
        state: as from `full_state_dict`, or from the serial module.
        local: see `full_state_dict`; its shapes give the size of each shard.

    Raises:
        UsageError: `local` is needed; or a name is missing or unexpected, or a shape or dtype
            differs; nothing was changed.
    """
    module.load_state_dict(local_state_dict(module, state, local))


def _sharded_dims(parameter: Parameter) -> list[tuple[Split, int]]:
    return [(split, split.dim) for split in parameter.splits if split.dim is not None]


def _local_state(module: Module, local: Mapping[str, Array] | None) -> Mapping[str, Array]:
    for name, parameter in module.named_parameters():
        if local is None and any(split.dim is None for split in parameter.splits):
            raise UsageError(
                f"parameter {name!r} is also cut as one flat row, so module.state_dict() may have "
                "no array of its shape. Pass local=, the state that the strategy which cut it "
                "puts together: for an FSDP model, local=model.full_state_dict()."
            )
        if local is not None and name not in local:
            raise UsageError(f"the local state lacks parameter {name!r}.")
    return module.state_dict() if local is None else local
