"""State dicts of an FSDP module's optimizer, with keys made of parameter names; and state from before the wrapping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from ferro import UsageError

from ..nn.arrays import Array, namespace_of
from ..nn.checks import first_few
from ..nn.module import Module
from ..nn.state import OptimizerWithState, StateLoad, cut_dims, gather_dims, position_in, slice_dims
from ..optim.state import FRESH, ParameterState
from .buffer_pool import to_namespace
from .config import FSDPConfig
from .sharded_parameter import FlatShard, ShardedParameter


def gather(
    sharded: Mapping[str, ShardedParameter], optimizer: OptimizerWithState, config: FSDPConfig, *, rank0_only: bool
) -> dict[str, Array]:
    """Gather the state of this module's parameters; dimensions that tensor parallelism has cut are made whole, too."""
    state: dict[str, Array] = {}
    for name, item in sharded.items():
        index = position_in(optimizer, item.parameter)
        for kind, array in ({} if index is None else optimizer.saved_arrays(index)).items():
            if not _is_sharded(optimizer, item, kind, array):
                state[f"{name}.{kind}"] = array.copy()
                continue
            whole = item.gather(array, config, rank0_only=rank0_only)
            if whole is not None:
                state[f"{name}.{kind}"] = gather_dims(whole, cut_dims(item.parameter))
    return state if config.is_first or not rank0_only else {}


def plan_load(
    sharded: Mapping[str, ShardedParameter],
    optimizer: OptimizerWithState,
    config: FSDPConfig,
    state: Mapping[str, Array],
) -> StateLoad:
    """Check a state from `gather`, and cut this rank's parts."""
    load = StateLoad(groups=list(config.groups))
    used: set[str] = set()
    for name, item in sharded.items():
        index = position_in(optimizer, item.parameter)
        if index is None:
            continue
        place = slice_dims(item.span.shape, item.parameter.data, cut_dims(item.parameter))
        arrays: dict[str, Array] = {}
        for full in [key for key in state if key.rpartition(".")[0] == name]:
            used.add(full)
            kind, whole = full[len(name) + 1 :], state[full]
            if faults := _array_faults(full, whole, may_be_shard=False):
                load.faults += faults
            elif kind == FRESH or kind in optimizer.whole_arrays:
                arrays[kind] = whole
            elif whole.shape != place.shape:
                load.faults.append(f"{full!r} is {place.shape}, given {whole.dtype} {whole.shape}")
            else:
                arrays[kind] = item.local_part(place.view(whole), config)
        load.add_groups(split.group for split, _ in cut_dims(item.parameter))
        load.states[index] = (name, arrays)
    load.unexpected = [key for key in state if key not in used]
    return load


def shards(
    sharded: Mapping[str, ShardedParameter], optimizer: ParameterState, config: FSDPConfig
) -> dict[str, FlatShard | Array]:
    """Do the work of `FSDP.sharded_optimizer_state_dict`."""
    state: dict[str, FlatShard | Array] = {**optimizer.settings_state()}
    for index, item in _items(sharded, optimizer):
        for name, array in optimizer.saved_arrays(index).items():
            is_sharded = _is_sharded(optimizer, item, name, array)
            state[f"{item.name}.{name}"] = item.flat_shard(array, config) if is_sharded else array.copy()
    return state


def load_shards(
    sharded: Mapping[str, ShardedParameter],
    optimizer: ParameterState,
    config: FSDPConfig,
    state: Mapping[str, FlatShard | Array],
) -> None:
    """Do the work of `FSDP.load_sharded_optimizer_state_dict`."""

    def own_part(item: ShardedParameter, key: str, given: object) -> tuple[Array | None, list[str]]:
        dtype = given.data.dtype if isinstance(given, FlatShard) else item.shard_view.dtype
        faults = item.shard_faults(key, dtype, given, config)
        if faults or not isinstance(given, FlatShard):
            return None, faults
        return given.data.reshape(item.shard_view.shape), []

    _load(sharded, optimizer, config, state, own_part, "load_sharded_optimizer_state_dict")


# -- state from before the wrapping ------------------------------------------------------------------


def check_states(module: Module) -> None:
    """Check that state of the parameters can be sharded.

    Raises:
        UsageError: an array is not of the parameter's shape; nothing was changed.
    """
    for parameter in module.parameters():
        for owner in parameter.state_owners:
            owner.check_reshape(parameter)


def shard_states(sharded: Mapping[str, ShardedParameter], config: FSDPConfig) -> None:
    """Let the owners of the parameters' state keep this rank's parts of it."""
    for item in sharded.values():
        for owner in item.parameter.state_owners:
            owner.reshape_state(item.parameter, partial(_own_part, item, config))


def _own_part(item: ShardedParameter, config: FSDPConfig, whole: Array) -> Array:
    part = item.local_part(whole, config).copy()
    return to_namespace(part, item.flat.shard_namespace)


# -- inside ------------------------------------------------------------------------------------------


def _items(
    sharded: Mapping[str, ShardedParameter], optimizer: ParameterState
) -> Iterator[tuple[int, ShardedParameter]]:
    """Yield the index of each of an optimizer's parameters, and its position in the module."""
    by_parameter = {id(item.parameter): item for item in sharded.values()}
    for index, parameter in enumerate(optimizer.parameters):
        item = by_parameter.get(id(parameter))
        if item is None:
            raise UsageError(
                f"FSDP: the optimizer's parameter {parameter.name!r} is none of this module. "
                "Give an optimizer of model.parameters()."
            )
        yield index, item


def _is_sharded(optimizer: OptimizerWithState, item: ShardedParameter, name: str, array: Array) -> bool:
    """Return True for state that is sharded like its parameter, False for what every rank has whole."""
    if name == FRESH or name in optimizer.whole_arrays:
        return False
    if array.shape == item.shard_view.shape:
        return True
    raise UsageError(
        f"FSDP: the optimizer's state {name!r} of parameter {item.name!r} has shape {array.shape}, and this rank's "
        f"piece {item.shard_view.shape}. It cannot be gathered; save optimizer.state_dict() on every rank instead."
    )


def _load(
    sharded: Mapping[str, ShardedParameter],
    optimizer: ParameterState,
    config: FSDPConfig,
    state: Mapping[str, Any],
    own_part: Callable[[ShardedParameter, str, Any], tuple[Array | None, list[str]]],
    what: str,
) -> None:
    """Load on all ranks, or on none.

    Args:
        sharded: the module's parameters by name.
        optimizer: the optimizer.
        config: the settings of the FSDP module.
        state: by name of parameter and of state.
        own_part: makes this rank's part of a given array, and lists the reasons why it cannot be loaded.
        what: the method, for messages.
    """
    items = [item for _, item in _items(sharded, optimizer)]
    names = [item.name for item in items]
    index_of = {name: index for index, name in enumerate(names)}
    settings: dict[str, Array] = {}
    given: list[dict[str, Array]] = [{} for _ in names]
    faults: list[str] = []
    for key, array in dict(state).items():
        name, _, kind = key.rpartition(".")
        index = index_of.get(name)
        is_sharded = index is not None and kind != FRESH and kind not in optimizer.whole_arrays
        found = _array_faults(key, array, may_be_shard=is_sharded)
        if index is None and not isinstance(array, FlatShard):
            settings[key] = np.asarray(array)
        elif index is not None and not found:
            part = array
            if is_sharded:
                part, found = own_part(items[index], key, array)
            if part is not None:
                given[index][kind] = part
        if index is not None or isinstance(array, FlatShard):
            faults += found
    agree = partial(_agree, config, what, faults)
    optimizer.load_parts(settings, given, names, agree)


def _agree(config: FSDPConfig, what: str, faults: list[str], more: list[str]) -> None:
    config.raise_on_any_fault(first_few(faults) or more, f"FSDP.{what}: the state does not fit")


def _array_faults(key: str, array: Any, *, may_be_shard: bool) -> list[str]:
    """List the reasons why this is no array; the other ranks must learn of it first."""
    if isinstance(array, FlatShard):
        return [] if may_be_shard else [f"{key!r} is in one piece, given a FlatShard"]
    try:
        namespace_of(array)
    except UsageError as error:
        return [f"{key!r}: {error}"]
    return []
