"""cut: put the parameters of a model into pieces, unit by unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np

from ..nn.arrays import namespace_of
from ..nn.module import Module
from ..nn.parameter import Parameter
from .flat import Flat
from .gathered import Shards
from .plan import Plan
from .units import owners


def cut(root: Module, chosen: Mapping[int, Module], plan: Plan) -> dict[int, Shards]:
    """Cut all parameters; return the units by their module's identity.

    Args:
        root: the model, whose unit comes first, even if it has nothing of its own.
        chosen: submodules that are units, if anything is left for them, by identity.
        plan: see there.
    """
    owner = owners(root, chosen)
    names = {id(module): name for name, module in root.named_modules()}
    parameters = dict(root.named_parameters())
    members: dict[int, list[str]] = {key: [] for key in names if key in (id(root), *chosen)}
    for name, parameter in parameters.items():
        parameter.name = name
        members[owner[id(parameter)]].append(name)
    units: dict[int, Shards] = {}
    for key, inside in members.items():
        if inside or key == id(root):
            flats = _flats([(name, parameters[name]) for name in inside], plan)
            units[key] = Shards(len(units), names[key], flats)
    return units


def _flats(named: Sequence[tuple[str, Parameter]], plan: Plan) -> list[Flat]:
    """Put parameters of one kind together."""
    kinds: dict[tuple[ModuleType, np.dtype, bool], list[tuple[str, Parameter]]] = {}
    for name, parameter in named:
        kind = namespace_of(parameter.data), parameter.data.dtype, parameter.requires_grad
        kinds.setdefault(kind, []).append((name, parameter))
    return [Flat(members, plan) for members in kinds.values()]
