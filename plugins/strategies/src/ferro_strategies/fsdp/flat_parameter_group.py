"""FlatParameterGroup: the flat parameters of one unit, which are gathered and freed together."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np

from ..nn.module import Module
from ..nn.parameter import Parameter
from .buffer_pool import PooledBuffer
from .config import FSDPConfig
from .flat_parameter import FlatParameter, value_namespace
from .kept_gather import Gather
from .unit_policy import owners


class UnshardedParameters:
    """The gathered parameters of a unit; their memory goes back to the pool when this object is dropped."""

    def __init__(self, flat_parameters: Sequence[FlatParameter]) -> None:
        # The operations under way, and the memory that they send.
        self._works: list[tuple[Gather, PooledBuffer]] = []
        self._flat_parameters = flat_parameters
        self._buffers = [flat.allocate_unsharded() for flat in flat_parameters]

    def launch(self, *, evaluating: bool, at_once: bool) -> None:
        """Start to gather; see `FlatParameter.all_gather`."""
        for flat, buffer in zip(self._flat_parameters, self._buffers, strict=True):
            try:
                work = flat.all_gather(buffer.array, evaluating=evaluating, at_once=at_once)
            except BaseException:
                buffer.abandon()  # other ranks may still write to it
                raise
            if work is not None:
                self._works.append(work)

    def wait(self) -> None:
        """Wait until everything is gathered."""
        for work, _ in self._works:
            work.wait()
        self._works = []

    def use_unsharded(self, *, backward: bool, may_defer: bool = False) -> None:
        """Make the parameters views of gathered memory; see `FlatParameter.use_unsharded`."""
        for flat, buffer in zip(self._flat_parameters, self._buffers, strict=True):
            flat.use_unsharded(buffer.array, backward=backward, may_defer=may_defer)

    def use_shards(self) -> None:
        """Make the parameters views of their shards again."""
        for flat in self._flat_parameters:
            if flat.is_unsharded:
                flat.use_shards()

    def __del__(self) -> None:
        if self._works:  # An operation that nobody waited for may still write.
            for buffer in (*self._buffers, *(sent for _, sent in self._works)):
                buffer.abandon()


class FlatParameterGroup:
    """All parameters of one unit: a flat parameter for each namespace, dtype and `requires_grad`.

    Attributes:
        index: its number in definition order, the same on every rank.
        name: the qualified name of the unit's module.
        flat_parameters: the flat parameters.
        trained: those that require gradients.
    """

    def __init__(self, index: int, name: str, flat_parameters: Sequence[FlatParameter]) -> None:
        self.index = index
        self.name = name
        self.flat_parameters = tuple(flat_parameters)
        self.trained = tuple(flat for flat in self.flat_parameters if flat.trained)
        self._last: weakref.ref[UnshardedParameters] | None = None

    def unshard(self, *, evaluating: bool = False, at_once: bool = False) -> UnshardedParameters:
        """Start to gather. If another pass still holds the gathered parameters, share its memory."""
        unsharded = None if self._last is None else self._last()
        if unsharded is None:
            unsharded = UnshardedParameters(self.flat_parameters)
            self._last = weakref.ref(unsharded)
        unsharded.launch(evaluating=evaluating, at_once=at_once)
        return unsharded

    @property
    def is_unsharded(self) -> bool:
        """True while the parameters view unsharded memory."""
        return any(flat.is_unsharded for flat in self.flat_parameters)

    @property
    def has_unsharded_grad(self) -> bool:
        """True if there are gradients that have not been reduced yet."""
        return any(flat.unsharded_grad.has_any for flat in self.trained)


def shard_module(root: Module, unit_modules: Mapping[int, Module], config: FSDPConfig) -> dict[int, FlatParameterGroup]:
    """Shard all parameters of a model; return the groups, keyed by the id of their unit's module.

    Args:
        root: the model, whose group comes first, even if it has no parameters of its own.
        unit_modules: the submodules that are units, keyed by id; a unit without parameters of its own gets no group.
        config: the settings of the FSDP module.
    """
    owner = owners(root, unit_modules)
    names = {id(module): name for name, module in root.named_modules()}
    parameters = dict(root.named_parameters())
    members: dict[int, list[str]] = {key: [] for key in names if key in (id(root), *unit_modules)}
    for name, parameter in parameters.items():
        parameter.name = name
        members[owner[id(parameter)]].append(name)
    groups: dict[int, FlatParameterGroup] = {}
    for key, inside in members.items():
        if inside or key == id(root):
            flat = _flatten([(name, parameters[name]) for name in inside], config)
            groups[key] = FlatParameterGroup(len(groups), names[key], flat)
    return groups


def _flatten(named: Sequence[tuple[str, Parameter]], config: FSDPConfig) -> list[FlatParameter]:
    """Make one flat parameter for each namespace, dtype and value of `requires_grad`."""
    kinds: dict[tuple[ModuleType, np.dtype, bool], list[tuple[str, Parameter]]] = {}
    for name, parameter in named:
        kind = value_namespace(parameter), parameter.dtype, parameter.requires_grad
        kinds.setdefault(kind, []).append((name, parameter))
    return [FlatParameter(members, config) for members in kinds.values()]
