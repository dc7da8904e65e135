"""UnitPolicy: which submodules are units, and to which unit a parameter belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from ferro import UsageError

from ..nn.module import Module
from ..nn.module_tree import children
from ..nn.parameter import Parameter

# A policy is given a submodule's qualified name and the submodule; True makes it a unit.
UnitPolicy: TypeAlias = Callable[[str, Module], bool]


def choose_units(root: Module, units: UnitPolicy | Iterable[Module] | None) -> dict[int, Module]:
    """Choose the submodules that are units; return them keyed by id.

    Args:
        root: the model, which is always a unit.
        units: a policy, or the submodules themselves. None: the outermost elements, with parameters, of lists, tuples
            and dicts; an element that consists only of such containers (a Sequential in a Sequential) is replaced by
            its own elements.

    Raises:
        UsageError: a module given is not below `root`.
    """
    below = {id(module): (name, module) for name, module in root.named_modules()}
    del below[id(root)]
    if units is None:
        return {id(module): module for module in _default_units(root)}
    if callable(units):
        return {key: module for key, (name, module) in below.items() if units(name, module)}
    given = {id(module): module for module in units}
    for key, module in given.items():
        if key not in below:
            raise UsageError(
                f"FSDP: the unit {module!r} is not below the module that is wrapped. Give "
                "submodules of it, or a function (name, module) -> bool."
            )
    return given


def owners(root: Module, units: Mapping[int, Module]) -> dict[int, int]:
    """Map the identity of each parameter to the identity of its unit's module.

    A parameter belongs to the innermost unit around it, or to the root if several units use it.
    """
    found: dict[int, int] = {}
    seen: set[tuple[int, int]] = set()

    def visit(module: Module, unit: int) -> None:
        unit = id(module) if id(module) in units else unit
        if (id(module), unit) in seen:
            return
        seen.add((id(module), unit))
        for child, _ in _children(module):
            if isinstance(child, Module):
                visit(child, unit)
            elif found.setdefault(id(child), unit) != unit:
                found[id(child)] = id(root)

    visit(root, id(root))
    return found


def _default_units(module: Module) -> Iterator[Module]:
    for child, in_container in _children(module):
        if isinstance(child, Module) and next(child.parameters(), None) is not None:
            if in_container and not _has_only_containers(child):
                yield child
            else:
                yield from _default_units(child)


def _has_only_containers(module: Module) -> bool:
    """Return True if all of a module's children are in its lists, tuples and dicts."""
    return all(isinstance(child, Module) and in_container for child, in_container in _children(module))


def _children(module: Module) -> Iterator[tuple[Module | Parameter, bool]]:
    """Yield a module's own modules and parameters, and whether each is in a list or another collection."""

    def visit(value: object, in_container: bool) -> Iterator[tuple[Module | Parameter, bool]]:
        if isinstance(value, Module | Parameter):
            yield value, in_container
        else:
            for _, item in children(value):
                yield from visit(item, True)

    for value in vars(module).values():
        yield from visit(value, False)
