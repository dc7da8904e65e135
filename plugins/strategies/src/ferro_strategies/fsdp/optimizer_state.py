"""State dicts of an FSDP module's optimizer, with keys made of parameter names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ferro import UsageError

from ..nn.arrays import Array
from ..optim import Optimizer
from .config import FSDPConfig
from .sharded_parameter import FlatShard, ShardedParameter, array_faults


def full(
    sharded: Mapping[str, ShardedParameter], optimizer: Optimizer, config: FSDPConfig, rank0_only: bool
) -> dict[str, Array]:
    """Do the work of `FSDP.full_optimizer_state_dict`."""
    state: dict[str, Array] = {"lr": np.array(optimizer.lr, np.float64)}
    for item, arrays in _states(sharded, optimizer):
        for name, array in arrays.items():
            key = f"{item.name}.{name}"
            if _is_sharded(item, array):
                whole = item.gather(array, config, rank0_only=rank0_only)
                if whole is not None:
                    state[key] = whole
            else:
                state[key] = array.copy()
    return state if config.is_first or not rank0_only else {}


def load_full(
    sharded: Mapping[str, ShardedParameter], optimizer: Optimizer, config: FSDPConfig, state: Mapping[str, Array]
) -> None:
    """Do the work of `FSDP.load_full_optimizer_state_dict`."""
    faults, loads = _load_lr(state)
    for key, item, initial, optimizer_key in _expected(sharded, optimizer, state, faults):
        array = state[key]
        is_sharded = _is_sharded(item, initial)
        shape = item.span.shape if is_sharded else initial.shape
        found = array_faults(key, initial.dtype, shape, array)
        faults += found
        if not found:
            loads[optimizer_key] = item.local_part(array, config) if is_sharded else array
    _load(optimizer, loads, faults, config, "load_full_optimizer_state_dict")


def shards(
    sharded: Mapping[str, ShardedParameter], optimizer: Optimizer, config: FSDPConfig
) -> dict[str, FlatShard | Array]:
    """Do the work of `FSDP.sharded_optimizer_state_dict`."""
    state: dict[str, FlatShard | Array] = {"lr": np.array(optimizer.lr, np.float64)}
    for item, arrays in _states(sharded, optimizer):
        for name, array in arrays.items():
            state[f"{item.name}.{name}"] = item.flat_shard(array, config) if _is_sharded(item, array) else array.copy()
    return state


def load_shards(
    sharded: Mapping[str, ShardedParameter],
    optimizer: Optimizer,
    config: FSDPConfig,
    state: Mapping[str, FlatShard | Array],
) -> None:
    """Do the work of `FSDP.load_sharded_optimizer_state_dict`."""
    faults, loads = _load_lr(state)
    for key, item, initial, optimizer_key in _expected(sharded, optimizer, state, faults):
        given = state[key]
        if _is_sharded(item, initial):
            found = item.shard_faults(key, initial, given, config)
            faults += found
            if isinstance(given, FlatShard) and not found:
                loads[optimizer_key] = given.data.reshape(initial.shape)
        elif isinstance(given, FlatShard):
            faults.append(f"{key!r} is in one piece, given a FlatShard")
        else:
            faults += array_faults(key, initial.dtype, initial.shape, given)
            loads[optimizer_key] = given
    _load(optimizer, loads, faults, config, "load_sharded_optimizer_state_dict")


def _states(
    sharded: Mapping[str, ShardedParameter], optimizer: Optimizer
) -> Iterator[tuple[ShardedParameter, dict[str, Array]]]:
    """Yield each of an optimizer's parameters with its state."""
    by_parameter = {id(item.parameter): item for item in sharded.values()}
    for parameter, arrays in zip(optimizer.parameters, optimizer.state, strict=True):
        item = by_parameter.get(id(parameter))
        if item is None:
            raise UsageError(
                f"FSDP: the optimizer's parameter {parameter.name!r} is none of this module. "
                "Give an optimizer of model.parameters()."
            )
        yield item, arrays


def _is_sharded(item: ShardedParameter, array: Array) -> bool:
    """Return True for state that is sharded like its parameter, False for one number per parameter."""
    if array.shape == item.shard_view.shape:
        return True
    if array.shape == ():
        return False
    raise UsageError(
        f"FSDP: the optimizer's state of parameter {item.name!r} has shape {array.shape}: "
        f"neither that of this rank's piece, {item.shard_view.shape}, nor (). It cannot be "
        "gathered; save optimizer.state_dict() on every rank instead."
    )


def _load_lr(state: Mapping[str, object]) -> tuple[list[str], dict[str, Array]]:
    """Begin a load: return a list of faults, and the arguments of the optimizer's `load_state_dict`."""
    lr = state.get("lr")
    if lr is None or isinstance(lr, FlatShard):
        return ["'lr' is missing or no single number"], {}
    return [], {"lr": np.asarray(lr)}


def _expected(
    sharded: Mapping[str, ShardedParameter], optimizer: Optimizer, state: Mapping[str, object], faults: list[str]
) -> list[tuple[str, ShardedParameter, Array, str]]:
    """List what can be loaded: (key here, parameter, initial state, the optimizer's own key)."""
    rest = set(state) - {"lr"}
    found = []
    for index, (item, _) in enumerate(_states(sharded, optimizer)):
        for name, initial in optimizer._initial_state(item.shard_view).items():
            key = f"{item.name}.{name}"
            if key in rest:
                rest.discard(key)
                found.append((key, item, initial, f"{index}.{name}"))
    faults += [f"unexpected {key!r}" for key in sorted(rest)]
    return found


def _load(optimizer: Optimizer, loads: dict[str, Array], faults: list[str], config: FSDPConfig, what: str) -> None:
    """Load on all ranks, or on none."""
    before = optimizer.lr, optimizer.state
    if not faults:
        try:
            optimizer.load_state_dict(loads)
        except UsageError as error:
            faults.append(str(error))
    try:
        config.raise_on_any_fault(faults, f"FSDP.{what}: the state does not fit")
    except UsageError:
        optimizer.lr, optimizer.state = before
        raise
