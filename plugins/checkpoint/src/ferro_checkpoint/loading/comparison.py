"""What of a checkpoint does not fit a state: names, shapes, dtypes, values."""

from __future__ import annotations

from ferro_checkpoint.loading.contents import Contents
from ferro_checkpoint.loading.names import name_faults
from ferro_checkpoint.placement.local_array import COMPLEX128
from ferro_checkpoint.plan.agreement import Holdings
from ferro_checkpoint.state.flatten import FlatState

_MOST_NAMED = 10


def value_faults(flat: FlatState, contents: Contents, *, strict: bool) -> list[str]:
    """Compare the values of the checkpoint with those of this rank's state.

    An object that has arrays and no values now does not need any, and a state of plain arrays does not take the values
    of the object that they were saved from.
    """
    values = contents.values
    wanted = {name for name in flat.puts if contents.chosen(name) and name not in contents.lacking}
    wanted = {name for name in wanted if name in values or flat.values[name] not in (None, [], {})}
    owners = {name[:end] for name, _ in flat.pieces for end, char in enumerate(name) if char == "."}
    there = {name for name in values if name in wanted or name not in owners}
    there -= {name for name in there - wanted if values[name] in (None, [], {})}
    changed = sorted(name for name in flat.fixed if name in values and values[name] != flat.values[name])
    return name_faults(wanted, there, "value", strict=strict) + [
        f"a tuple holds value {name!r}, and another is in the checkpoint, which a tuple cannot take: use a list"
        for name in changed[:_MOST_NAMED]
    ]


def states_left_out(flat: FlatState, contents: Contents) -> set[str]:
    """List tensors of the state of parameters that are frozen now, and so have no state here."""
    return {name for name in contents.tensors if name not in flat.of_parameters and _parameter_of(name) in flat.frozen}


def states_begun(flat: FlatState, contents: Contents) -> set[str]:
    """List parameters, "optimizer.0.weight", of which an optimizer in the checkpoint has no state.

    They were frozen, or not given to it. Where it has no state of any parameter, it is another kind of optimizer.
    """
    known = {_parameter_of(name) for name in contents.tensors}
    optimizers = [path for path in flat.states if any(name.startswith(f"{path}.") for name in known)]
    return {
        parameter
        for name, parameter in flat.of_parameters.items()
        if parameter not in known and contents.chosen(name) and any(parameter.startswith(f"{o}.") for o in optimizers)
    }


def _parameter_of(name: str) -> str:
    return name.rpartition(".")[0]


def array_faults(holdings: Holdings, contents: Contents, left_out: set[str], *, strict: bool) -> list[str]:
    """Compare names, shapes and dtypes of the arrays of all ranks; all of them find the same faults.

    Args:
        holdings: the arrays.
        contents: of the checkpoint.
        left_out: tensors that no rank needs.
        strict: whether names that one of them lacks are faults.
    """
    faults = []
    for name, dtype, shape in zip(holdings.names, holdings.dtypes, holdings.shapes, strict=True):
        place = contents.tensors.get(name)
        if place is None:
            continue
        stored = (COMPLEX128 if place.complex128 else place.dtype, place.shape)
        if stored != (dtype, shape):
            faults.append(f"{name!r} is {_of(*stored)} in the checkpoint, and {_of(dtype, shape)} in the state")
    if len(faults) > _MOST_NAMED:
        faults[_MOST_NAMED:] = [f"and {len(faults) - _MOST_NAMED} more"]
    wanted = set(holdings.names)
    there = set(contents.tensors) - ((contents.of_single_ranks() | left_out) - wanted)
    return faults + name_faults(wanted, there, "tensor", strict=strict)


def _of(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {shape[:-1] if dtype == COMPLEX128 else shape}"
