"""ParameterState: arrays kept for each parameter, such as moments, which follow what a strategy makes of it."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from ferro.errors import UsageError

from ..nn.arrays import Array, namespace_of
from ..nn.checks import first_few
from ..nn.parameter import Parameter
from .blocks import cached_wide_dtype

# The name in a state dict that says that a parameter has no state yet.
FRESH = "fresh"
_SAMPLES = 16


class ParameterState(ABC):
    """The base of optimizers and of averages of weights: arrays by name for each parameter.

    Attributes:
        parameters: the parameters.
        state: for each parameter, its arrays by name; empty before the first step. An array has the shape of what the
            parameter holds on this rank, unless it is one number per parameter.
    """

    # The names of arrays that are not cut where a parameter is cut, such as one number per parameter.
    whole_arrays: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = list(parameters)
        self.state: list[dict[str, Array]] = [{} for _ in self.parameters]
        self._retired: dict[int, str] = {}
        for parameter in self.parameters:
            parameter.add_state_owner(self)

    # -- saving and loading ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """Copy the settings, and the state of each parameter as "<index>.<name>", by position in `parameters`.

        A parameter that has no state yet is marked by "<index>.fresh". Under FSDP and tensor parallelism the arrays are
        this rank's pieces: save the module's `full_optimizer_state_dict` instead, which fits any number of ranks.
        """
        state = self.settings_state()
        for index in range(len(self.parameters)):
            state |= {f"{index}.{name}": array.copy() for name, array in self.saved_arrays(index).items()}
        return state

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Restore a state from `state_dict`, for parameters of the same shapes.

        Raises:
            UsageError: a name is missing or unexpected, or a shape or dtype differs; the first
                few of each are listed, and nothing was changed.
        """

        def agree(faults: list[str]) -> None:
            if faults:
                raise UsageError(
                    f"load_state_dict: the state does not fit this {type(self).__name__} of "
                    f"{len(self.parameters)} parameters: {'; '.join(faults)}. Nothing was loaded."
                )

        self.load_named(state, [str(index) for index in range(len(self.parameters))], agree)

    def load_named(self, state: Mapping[str, Array], names: Sequence[str], agree: Callable[[list[str]], None]) -> None:
        """Restore a state whose keys are "<name of the parameter>.<name of the state>".

        Args:
            state: the arrays of what the parameters hold on this rank, and the settings.
            names: the names of the parameters.
            agree: takes the reasons why the state does not fit, and raises an error if there is one on any rank.
        """
        rest: dict[str, Array] = {
            key: value if isinstance(value, np.ndarray) or hasattr(value, "shape") else np.asarray(value)
            for key, value in dict(state).items()
        }
        given: list[dict[str, Array]] = [{} for _ in names]
        index_of = {name: index for index, name in enumerate(names)}
        for key in list(rest):
            name, _, kind = key.rpartition(".")
            if name in index_of:
                given[index_of[name]][kind] = rest.pop(key)
        self.load_parts(rest, given, names, agree)

    def load_parts(
        self,
        settings: Mapping[str, Array],
        given: Sequence[Mapping[str, Array]],
        names: Sequence[str],
        agree: Callable[[list[str]], None],
    ) -> None:
        """Restore settings, and for each parameter its arrays by name, on all ranks or on none.

        Args:
            settings: see `settings_state`.
            given: the arrays of each parameter, as `saved_arrays` lists them.
            names: the names of the parameters, for messages.
            agree: takes the reasons why the state does not fit, and raises an error if there is one on any rank.
        """
        before = self.settings_state()
        faults = first_few(self.settings_faults(settings))
        if not faults:
            self.load_settings(settings)  # They decide of what the state consists.
        # A state from before settings were saved has only "lr", and does not say which parameters are fresh.
        complete = set(settings) != {"lr"}
        loaded: list[dict[str, Array]] = []
        found: list[str] = []
        for index, (name, arrays) in enumerate(zip(names, given, strict=True)):
            own, unfit = self._checked_arrays(index, name, arrays, complete=complete)
            loaded.append(own)
            found += unfit
        try:
            agree(faults + first_few(found))
        except UsageError:
            self.load_settings(before)
            raise
        self.state = loaded

    def saved_arrays(self, index: int) -> dict[str, Array]:
        """List the arrays to save for the parameter at this position: its state, or the mark that there is none yet."""
        arrays = self.state[index]
        return arrays if arrays or not self.keeps_state(index) else {FRESH: np.array(True)}

    def keeps_state(self, index: int) -> bool:
        """Say whether the parameter at this position has state after its first step."""
        return True

    @abstractmethod
    def settings_state(self) -> dict[str, Array]:
        """Copy the part of the state that belongs to no parameter."""

    @abstractmethod
    def settings_faults(self, state: Mapping[str, Array]) -> list[str]:
        """List the reasons why `load_settings` cannot take these arrays; empty if it can."""

    @abstractmethod
    def load_settings(self, state: Mapping[str, Array]) -> None:
        """Restore what `settings_state` copied."""

    @abstractmethod
    def initial_state(self, index: int) -> dict[str, Array]:
        """Make the state that the parameter at this position has before its first step."""

    # -- changes of the parameters ---------------------------------------------------------------

    def check_fits(self) -> None:
        """Check that the state fits what every parameter holds now.

        Raises:
            UsageError: a shape or a dtype differs, or a parameter was replaced by others; nothing was changed.
        """
        for parameter, arrays in zip(self.parameters, self.state, strict=True):
            if arrays:
                data = parameter.data
                shape, dtype = data.shape, cached_wide_dtype(data.dtype)
                for name, array in arrays.items():
                    if (array.shape != shape or array.dtype != dtype) and name not in self.whole_arrays:
                        raise self._misfit(parameter, name, array)
        if self._retired:
            names = ", ".join(first_few([repr(name) for name in self._retired.values()]))
            raise UsageError(
                f"{type(self).__name__}: it holds parameters that the model no longer has: {names}. "
                f"Their layers were replaced after it was made, so it would not train them. Make the "
                f"{type(self).__name__} from the parameters of the model as it is now."
            )

    def check_reshape(self, parameter: Parameter) -> None:
        """Check that the state of a parameter can be converted to that of a part of it.

        Raises:
            UsageError: an array of it has another shape than the parameter; nothing was changed.
        """
        for known, arrays in zip(self.parameters, self.state, strict=True):
            if known is parameter:
                for name, array in arrays.items():
                    if array.shape != parameter.data.shape and name not in self.whole_arrays:
                        raise UsageError(
                            f"{type(self).__name__}: its state {name!r} of parameter {parameter.name!r} has shape "
                            f"{array.shape}, so it cannot be cut like the parameter, {parameter.data.shape}. Make "
                            "the optimizer after the model is wrapped, and load its state then."
                        )

    def reshape_state(self, parameter: Parameter, convert: Callable[[Array], Array]) -> None:
        """Convert the state of a parameter whose value a strategy has replaced by a part of it, or by the whole.

        Args:
            parameter: it holds its new value.
            convert: makes, of an array of the shape of the old value, the array that belongs to the new one.
        """
        for known, arrays in zip(self.parameters, self.state, strict=True):
            if known is parameter:
                for name, array in arrays.items():
                    if name not in self.whole_arrays:
                        arrays[name] = convert(array)

    def retire_parameter(self, parameter: Parameter) -> None:
        """Learn that the model no longer has a parameter, so that the next step is refused."""
        for index, known in enumerate(self.parameters):
            if known is parameter:
                self._retired[index] = parameter.name or f"number {index}"

    def describe_state(self, parameter: Parameter) -> str:
        """Describe the state of a parameter, with a checksum of some values, to compare ranks."""
        for known, arrays in zip(self.parameters, self.state, strict=True):
            if known is parameter:
                parts = [f"{name} {array.dtype} {_sample(array)}" for name, array in arrays.items()]
                return f"of {type(self).__name__}: {', '.join(parts) or 'none yet'}"
        return ""

    # -- inside ----------------------------------------------------------------------------------

    def _misfit(self, parameter: Parameter, name: str, array: Array) -> UsageError:
        data, own = parameter.data, type(self).__name__
        return UsageError(
            f"{own}: the state {name!r} of parameter {parameter.name!r} is {array.dtype} {array.shape}, and the "
            f"parameter now holds {data.dtype} {data.shape}. Something replaced its value after the state was made or "
            f"loaded: make the {own} after that, and load the state then. Nothing was updated."
        )

    def _checked_arrays(
        self, index: int, name: str, given: Mapping[str, Array], *, complete: bool
    ) -> tuple[dict[str, Array], list[str]]:
        """Copy the given state of one parameter; return it with the reasons why it does not fit."""
        initial = self.initial_state(index)
        if (FRESH in given and len(given) == 1) or (not given and not (initial and complete)):
            return {}, []
        faults = [f"unexpected '{name}.{kind}'" for kind in given if kind not in initial]
        for kind, here in initial.items():
            there, key = given.get(kind), f"{name}.{kind}"
            if there is None:
                faults.append(f"missing {key!r}")
            elif (here.shape, here.dtype) != (there.shape, there.dtype):
                faults.append(f"{key!r} is {here.dtype} {here.shape}, given {there.dtype} {there.shape}")
            else:
                here[...] = namespace_of(here).asarray(there)
        return initial, faults


def _sample(array: Array) -> str:
    """Write a checksum of a few elements, evenly spread."""
    flat = array.reshape(array.size)
    elements = str(flat[:: max(1, array.size // _SAMPLES)].tolist())
    return f"{array.shape} with checksum {zlib.crc32(elements.encode()):08x}"
