"""State dicts of the optimizer of an FSDP module, by names of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ferro import UsageError

from ..nn.arrays import Array
from ..optim import Optimizer
from .plan import Plan
from .state import Entry, FlatShard, unlike, wrong_shard


def full(
    entries: Mapping[str, Entry], optimizer: Optimizer, plan: Plan, rank0_only: bool
) -> dict[str, Array]:
    """See `FSDP.full_optimizer_state_dict`."""
    state: dict[str, Array] = {"lr": np.array(optimizer.lr, np.float64)}
    for entry, arrays in _held(entries, optimizer):
        for name, array in arrays.items():
            key = f"{entry.name}.{name}"
            if _is_cut(entry, array):
                whole = entry.gather(array, plan, rank0_only=rank0_only)
                if whole is not None:
                    state[key] = whole
            else:
                state[key] = array.copy()
    return state if plan.is_first or not rank0_only else {}


def load_full(
    entries: Mapping[str, Entry], optimizer: Optimizer, plan: Plan, state: Mapping[str, Array]
) -> None:
    """See `FSDP.load_full_optimizer_state_dict`."""
    faults, loaded = _started(state)
    for key, entry, fresh, index in _expected(entries, optimizer, state, faults):
        array = state[key]
        cut = _is_cut(entry, fresh)
        shape = entry.place.shape if cut else fresh.shape
        found = unlike(key, fresh.dtype, shape, array)
        faults += found
        if not found:
            loaded[index] = entry.cut(array, plan) if cut else array
    _load(optimizer, loaded, faults, plan, "load_full_optimizer_state_dict")


def sharded(
    entries: Mapping[str, Entry], optimizer: Optimizer, plan: Plan
) -> dict[str, FlatShard | Array]:
    """See `FSDP.sharded_optimizer_state_dict`."""
    state: dict[str, FlatShard | Array] = {"lr": np.array(optimizer.lr, np.float64)}
    for entry, arrays in _held(entries, optimizer):
        for name, array in arrays.items():
            cut = _is_cut(entry, array)
            state[f"{entry.name}.{name}"] = entry.shard(array, plan) if cut else array.copy()
    return state


def load_sharded(
    entries: Mapping[str, Entry],
    optimizer: Optimizer,
    plan: Plan,
    state: Mapping[str, FlatShard | Array],
) -> None:
    """See `FSDP.load_sharded_optimizer_state_dict`."""
    faults, loaded = _started(state)
    for key, entry, fresh, index in _expected(entries, optimizer, state, faults):
        item = state[key]
        if _is_cut(entry, fresh):
            found = wrong_shard(key, entry, fresh, item, plan)
            faults += found
            if isinstance(item, FlatShard) and not found:
                loaded[index] = item.data.reshape(fresh.shape)
        elif isinstance(item, FlatShard):
            faults.append(f"{key!r} is in one piece, given a FlatShard")
        else:
            faults += unlike(key, fresh.dtype, fresh.shape, item)
            loaded[index] = item
    _load(optimizer, loaded, faults, plan, "load_sharded_optimizer_state_dict")


def _held(
    entries: Mapping[str, Entry], optimizer: Optimizer
) -> Iterator[tuple[Entry, dict[str, Array]]]:
    """Yield the entry and the state of each of an optimizer's parameters."""
    by_parameter = {id(entry.parameter): entry for entry in entries.values()}
    for parameter, arrays in zip(optimizer.parameters, optimizer.state, strict=True):
        entry = by_parameter.get(id(parameter))
        if entry is None:
            raise UsageError(
                f"FSDP: the optimizer's parameter {parameter.name!r} is none of this module. "
                "Give an optimizer of model.parameters()."
            )
        yield entry, arrays


def _is_cut(entry: Entry, array: Array) -> bool:
    """Say whether a parameter's state is in pieces as the parameter is, or one for all of it."""
    if array.shape == entry.piece.shape:
        return True
    if array.shape == ():
        return False
    raise UsageError(
        f"FSDP: the optimizer's state of parameter {entry.name!r} has shape {array.shape}: "
        f"neither that of this rank's piece, {entry.piece.shape}, nor (). It cannot be gathered; "
        "save optimizer.state_dict() on every rank instead."
    )


def _started(state: Mapping[str, object]) -> tuple[list[str], dict[str, Array]]:
    """Return faults, and what the optimizer's own `load_state_dict` is to be given."""
    lr = state.get("lr")
    if lr is None or isinstance(lr, FlatShard):
        return ["'lr' is missing or no single number"], {}
    return [], {"lr": np.asarray(lr)}


def _expected(
    entries: Mapping[str, Entry],
    optimizer: Optimizer,
    state: Mapping[str, object],
    faults: list[str],
) -> list[tuple[str, Entry, Array, str]]:
    """Return what there is to load: (key here, entry, state as at first, optimizer's own key)."""
    rest = set(state) - {"lr"}
    found = []
    for index, (entry, _) in enumerate(_held(entries, optimizer)):
        for name, fresh in optimizer._initial_state(entry.piece).items():
            key = f"{entry.name}.{name}"
            if key in rest:
                rest.discard(key)
                found.append((key, entry, fresh, f"{index}.{name}"))
    faults += [f"unexpected {key!r}" for key in sorted(rest)]
    return found


def _load(
    optimizer: Optimizer, loaded: dict[str, Array], faults: list[str], plan: Plan, what: str
) -> None:
    """Load on all ranks, or on none."""
    before = optimizer.lr, optimizer.state
    if not faults:
        try:
            optimizer.load_state_dict(loaded)
        except UsageError as error:
            faults.append(str(error))
    try:
        plan.agree(faults, f"FSDP.{what}: the state does not fit")
    except UsageError:
        optimizer.lr, optimizer.state = before
        raise
