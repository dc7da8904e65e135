"""StateOwner: an object that keeps arrays for a parameter, and is told when the parameter changes its shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from .arrays import Array

# The class Parameter, which imports this module.
ParameterT = TypeVar("ParameterT", contravariant=True)


class SavesState(Protocol):
    """An object with a state that can be saved, such as an optimizer or a loss scaler."""

    def state_dict(self) -> dict[str, Array]:
        """Copy its state."""

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Restore a state from `state_dict`."""


class StateOwner(SavesState, Protocol[ParameterT]):
    """An object with arrays that belong to a parameter, such as an optimizer with its moments.

    It registers by `Parameter.add_state_owner`. A strategy that makes the parameter hold a part of the value, or that
    replaces the parameter, calls it.
    """

    def state_dict(self) -> dict[str, Array]:
        """Copy its state."""

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Restore a state from `state_dict`."""

    def check_fits(self) -> None:
        """Check that the state fits what every parameter holds now.

        Raises:
            UsageError: it does not; nothing was changed.
        """

    def describe_state(self, parameter: ParameterT) -> str:
        """Describe the state of a parameter, with a checksum of some values, to compare ranks."""

    def check_reshape(self, parameter: ParameterT) -> None:
        """Check that the state of a parameter can be converted to that of a part of it.

        Raises:
            UsageError: it cannot; nothing was changed.
        """

    def reshape_state(self, parameter: ParameterT, convert: Callable[[Array], Array]) -> None:
        """Convert the state of a parameter, after the parameter has got its new value.

        Args:
            parameter: the parameter.
            convert: makes, of an array of the shape of the old value, the array that belongs to the new value.
        """

    def retire_parameter(self, parameter: ParameterT) -> None:
        """Learn that the model no longer has a parameter, so that the next step is refused."""
