"""StateOwner: an object that keeps arrays for a parameter, and is told when the parameter changes its shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .arrays import Array

if TYPE_CHECKING:
    from .parameter import Parameter


class StateOwner(Protocol):
    """An object with arrays that belong to a parameter, such as an optimizer with its moments.

    It registers by `Parameter.add_state_owner`. A strategy that makes the parameter hold a part of the value, or that
    replaces the parameter, calls it.
    """

    def check_fits(self) -> None:
        """Check that the state fits what every parameter holds now.

        Raises:
            UsageError: it does not; nothing was changed.
        """

    def describe_state(self, parameter: Parameter) -> str:
        """Describe the state of a parameter, with a checksum of some values, to compare ranks."""

    def check_reshape(self, parameter: Parameter) -> None:
        """Check that the state of a parameter can be converted to that of a part of it.

        Raises:
            UsageError: it cannot; nothing was changed.
        """

    def reshape_state(self, parameter: Parameter, convert: Callable[[Array], Array]) -> None:
        """Convert the state of a parameter, after the parameter has got its new value.

        Args:
            parameter: the parameter.
            convert: makes, of an array of the shape of the old value, the array that belongs to the new value.
        """

    def retire_parameter(self, parameter: Parameter) -> None:
        """Learn that the model no longer has a parameter, so that the next step is refused."""
