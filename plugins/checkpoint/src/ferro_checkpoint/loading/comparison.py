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


def array_faults(holdings: Holdings, contents: Contents, *, strict: bool) -> list[str]:
    """Compare names, shapes and dtypes of the arrays of all ranks; all of them find the same faults."""
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
    there = set(contents.tensors) - (contents.of_single_ranks() - wanted)
    return faults + name_faults(wanted, there, "tensor", strict=strict)


def _of(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {shape[:-1] if dtype == COMPLEX128 else shape}"
