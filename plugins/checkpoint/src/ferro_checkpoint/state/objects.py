"""The objects in a state that a checkpoint knows by their methods; `docs/checkpoint.md` describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeGuard

from ferro_checkpoint.placement.array_piece import Placed


class HasArrays(Protocol):
    """A module, a sharded tensor, or anything else with arrays that are saved where they are."""

    def checkpoint_arrays(self) -> Mapping[str, Placed | object]: ...  # noqa: D102


class HasParameters(Protocol):
    """A module: optimizers in the same state name their arrays by its parameters."""

    def checkpoint_parameters(self) -> Mapping[str, object]: ...  # noqa: D102


class HasOptimizerArrays(Protocol):
    """An optimizer. It is given the names of the parameters of all modules in the state, by their `id`."""

    def checkpoint_optimizer_arrays(self, names: Mapping[int, str]) -> Mapping[str, Placed | object]: ...  # noqa: D102


class HasStateDict(Protocol):
    """A sampler, a loader, a schedule, or anything else whose state is a dict of numbers, texts and arrays."""

    def state_dict(self) -> Mapping[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: Any) -> object: ...  # noqa: D102


def _has(value: object, *methods: str) -> bool:
    return not isinstance(value, type) and all(callable(getattr(value, method, None)) for method in methods)


def has_arrays(value: object) -> TypeGuard[HasArrays]:
    """Say whether this is a module, or the like."""
    return _has(value, "checkpoint_arrays")


def has_parameters(value: object) -> TypeGuard[HasParameters]:
    """Say whether this names parameters."""
    return _has(value, "checkpoint_parameters")


def has_optimizer_arrays(value: object) -> TypeGuard[HasOptimizerArrays]:
    """Say whether this is an optimizer."""
    return _has(value, "checkpoint_optimizer_arrays")


def has_state_dict(value: object) -> TypeGuard[HasStateDict]:
    """Say whether this has a state dict, and has nothing better."""
    return _has(value, "state_dict", "load_state_dict")
