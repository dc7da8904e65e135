"""Saving and loading: loads that are checked as a whole before any array changes, and pieces of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ferro import ProcessGroup
from ferro.errors import UsageError

from .arrays import Array, namespace_of
from .checks import first_few
from .module_tree import Buffer
from .parameter import Parameter, Split


class StateDifference(NamedTuple):
    """The names by which a state and a module differ.

    Attributes:
        missing: names of the module that the state lacks.
        unexpected: names of the state that the module lacks.
    """

    missing: list[str]
    unexpected: list[str]


class OptimizerWithState(Protocol):
    """The part of an optimizer that saving and loading by parameter names needs.

    Attributes:
        parameters: the parameters, in the order given.
        whole_arrays: names of state that is not cut where a parameter is cut, such as one number per parameter.
    """

    @property
    def parameters(self) -> list[Parameter]: ...  # noqa: D102

    @property
    def whole_arrays(self) -> frozenset[str]: ...  # noqa: D102

    def settings_state(self) -> dict[str, Array]:
        """Copy "lr" and other state that belongs to no parameter."""

    def saved_arrays(self, index: int) -> dict[str, Array]:
        """List the arrays to save for the parameter at this position."""

    def load_parts(
        self,
        settings: Mapping[str, Array],
        given: Sequence[Mapping[str, Array]],
        names: Sequence[str],
        agree: Callable[[list[str]], None],
    ) -> None:
        """Restore settings, and the arrays of each parameter, unless `agree` raises an error about the faults."""


@dataclass(slots=True)
class StateLoad:
    """A load of a state that has been checked and not yet been done.

    A module returns it for its own part (`Module.prepare_load_state_dict`), and the module around it adds it to its
    own, so that either everything is loaded or nothing, on all ranks alike.

    Attributes:
        missing: names that the state lacks.
        unexpected: names of the state that have no counterpart.
        faults: other reasons why the state does not fit, such as "'0.weight' is float32 (3, 4), given float32 (4, 3)".
        loads: functions that load one array each; they do not fail.
        states: for each of an optimizer's parameters, by its position, its qualified name and the arrays of this rank.
        groups: the groups of ranks that load together: if one of their ranks finds a fault, none loads.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    loads: list[Callable[[], None]] = field(default_factory=list)
    states: dict[int, tuple[str, dict[str, Array]]] = field(default_factory=dict)
    groups: list[ProcessGroup] = field(default_factory=list)

    def add(self, prefix: str, part: StateLoad) -> None:
        """Add the load of a part, whose names get `prefix`."""
        self.missing += [prefix + name for name in part.missing]
        self.unexpected += [prefix + name for name in part.unexpected]
        self.faults += [f"in {prefix[:-1]!r}: {fault}" if prefix else fault for fault in part.faults]
        self.loads += part.loads
        self.states |= {index: (prefix + name, arrays) for index, (name, arrays) in part.states.items()}
        self.add_groups(part.groups)

    def add_groups(self, groups: Iterable[ProcessGroup]) -> None:
        """Add groups whose ranks load together."""
        self.groups += [group for group in groups if not any(group is known for known in self.groups)]

    def expect(self, name: str, holder: Parameter | Buffer, state: Mapping[str, Array]) -> None:
        """Plan to copy `state[name]` into the data of `holder`, or note why that is impossible."""
        if isinstance(holder, Parameter) and holder.is_deferred:
            dtype, shape = holder.dtype, holder.shape
        else:
            dtype, shape = holder.data.dtype, holder.data.shape
        if name not in state:
            self.missing.append(name)
        elif fault := array_fault(name, dtype, shape, state[name]):
            self.faults.append(fault)
        else:
            self.loads.append(lambda: _load(holder, state[name]))

    def check(self, what: str, more: list[str], *, strict: bool = True) -> None:
        """Raise on every rank of `groups` if one has found a fault; all of them call it.

        Args:
            what: the beginning of the message, such as "load_state_dict: the state does not fit Linear".
            more: other faults.
            strict: whether missing and unexpected names are faults.

        Raises:
            UsageError: a rank has found a fault; the message has the first few of the first such rank.
        """
        found: list[str] = []
        if strict:
            found += first_few([f"missing {name!r}" for name in self.missing])
            found += first_few([f"unexpected {name!r}" for name in self.unexpected])
        text = "; ".join([*found, *first_few(self.faults), *more])
        if found and not self.faults and not more and not self.states and self.loads:
            text += " (strict=False loads the names that both have)"
        for group in self.groups:
            texts: list[str] = group.all_gather_object(text)
            rank, text = next(((rank, each) for rank, each in enumerate(texts) if each), (group.rank, ""))
            if text and rank != group.rank and "(found by rank " not in text:
                text += f" (found by rank {rank} of group {group.name!r})"
        if text:
            raise UsageError(f"{what}: {text}. Nothing was loaded.")

    def finish(self, what: str, *, strict: bool = True) -> StateDifference:
        """Load everything on all ranks of `groups`, or nothing on any; see `check`."""
        self.check(what, [], strict=strict)
        for load in self.loads:
            load()
        return StateDifference(self.missing, self.unexpected)

    def finish_optimizer(self, what: str, optimizer: OptimizerWithState, settings: Mapping[str, Array]) -> None:
        """Load `states` and settings into an optimizer on all ranks of `groups`, or on none; see `check`."""
        names, given = [], []
        for index, parameter in enumerate(optimizer.parameters):
            name, arrays = self.states.get(index, (parameter.name, {}))
            names.append(name)
            given.append(arrays)
        optimizer.load_parts(settings, given, names, lambda faults: self.check(what, faults))


def array_fault(name: str, dtype: object, shape: tuple[int, ...], array: object) -> str:
    """Say why `array` cannot be loaded as this dtype and shape; "" if it can."""
    try:
        namespace_of(array)  # type: ignore[arg-type]  # the call is the check
    except UsageError as error:
        return f"{name!r}: {error}"
    there: Array = array  # type: ignore[assignment]
    if (dtype, shape) == (there.dtype, there.shape):
        return ""
    return f"{name!r} is {dtype} {shape}, given {there.dtype} {there.shape}"


def _load(holder: Parameter | Buffer, source: Array) -> None:
    """Copy values, also between the host and a GPU; a deferred parameter gets an array of its own."""
    if isinstance(holder, Parameter) and holder.is_deferred:
        holder.data = namespace_of(source).array(source, order="C")
    else:
        holder.data[...] = namespace_of(holder.data).asarray(source)


def cut_dims(parameter: Parameter) -> list[tuple[Split, int]]:
    """List the splits of a parameter along its dimensions, first to last; not those of flat rows."""
    return [(split, split.dim) for split in parameter.splits if split.dim is not None]


def gather_dims(array: Array, splits: Iterable[tuple[Split, int]]) -> Array:
    """Concatenate the pieces of all ranks along the dimensions of `splits`; all ranks of the groups call it."""
    for split, dim in reversed(list(splits)):
        sizes = _sizes(array.shape[dim], split, array)
        array = split.group.all_gather(array.swapaxes(0, dim), sizes=sizes).swapaxes(0, dim)
    return array


def slice_dims(shape: tuple[int, ...], like: Array, splits: Iterable[tuple[Split, int]]) -> Slices:
    """Locate this rank's piece, of `shape`, in the whole array; all ranks of the groups call it."""
    whole, slices = list(shape), []
    for split, dim in reversed(list(splits)):
        sizes = _sizes(whole[dim], split, like)
        start = sum(sizes[: split.group.rank])
        slices.append((dim, slice(start, start + sizes[split.group.rank])))
        whole[dim] = sum(sizes)
    return Slices(tuple(whole), slices)


class Slices(NamedTuple):
    """The position of a rank's piece in a whole array.

    Attributes:
        shape: that of the whole array.
        slices: (dimension, part along it), to be applied last to first.
    """

    shape: tuple[int, ...]
    slices: list[tuple[int, slice]]

    def view(self, whole: Array) -> Array:
        """View the piece."""
        for dim, part in reversed(self.slices):
            whole = whole.swapaxes(0, dim)[part].swapaxes(0, dim)
        return whole


def _sizes(size: int, split: Split, like: Array) -> tuple[int, ...]:
    own = namespace_of(like).array([size])
    return tuple(int(count) for count in split.group.all_gather(own).tolist())


def gather_optimizer_state(name: str, parameter: Parameter, optimizer: OptimizerWithState) -> dict[str, Array]:
    """Copy an optimizer's state of a parameter, whole, by "<name>.<name of state>"; {} if it has another's.

    All ranks that have pieces of the parameter call it.
    """
    index = position_in(optimizer, parameter)
    if index is None:
        return {}
    result = {}
    for key, array in optimizer.saved_arrays(index).items():
        cut = array.shape == parameter.shape and key not in optimizer.whole_arrays
        result[f"{name}.{key}"] = (gather_dims(array, cut_dims(parameter)) if cut else array).copy()
    return result


def plan_optimizer_load(
    load: StateLoad, name: str, parameter: Parameter, optimizer: OptimizerWithState, state: Mapping[str, Array]
) -> set[str]:
    """Add to `load` this rank's pieces of the state of a parameter, or the reasons why they do not fit.

    Returns:
        The names of `state` that belong to the parameter.
    """
    index = position_in(optimizer, parameter)
    if index is None:
        return set()
    splits = cut_dims(parameter)
    load.add_groups(split.group for split, _ in splits)
    place = slice_dims(parameter.shape, parameter.data, splits)
    arrays: dict[str, Array] = {}
    used = {key for key in state if key.rpartition(".")[0] == name}
    for full in used:
        key, array = full[len(name) + 1 :], state[full]
        if not splits or key in optimizer.whole_arrays or array.shape == ():
            arrays[key] = array
        elif array.shape != place.shape:
            load.faults.append(f"{full!r} is {place.shape}, given {array.shape}")
        else:
            arrays[key] = place.view(array)
    load.states[index] = (name, arrays)
    return used


def position_in(optimizer: OptimizerWithState, parameter: Parameter) -> int | None:
    """Find a parameter among an optimizer's."""
    return next((index for index, known in enumerate(optimizer.parameters) if known is parameter), None)
