"""Units: which submodules are gathered by themselves, and to which unit a parameter belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from ferro import UsageError

from ..nn.module import Module
from ..nn.parameter import Parameter

# Says of a submodule, given its qualified name and itself, whether it is a unit.
UnitPolicy: TypeAlias = Callable[[str, Module], bool]


def choose_units(root: Module, units: UnitPolicy | Iterable[Module] | None) -> dict[int, Module]:
    """Return the submodules that are to be units, by identity.

    Args:
        root: the model, which is a unit anyway.
        units: a policy, or the submodules themselves. None: the elements of lists, tuples and
            dicts that have parameters, seen from outside in; but an element that only holds such
            elements itself, as a Sequential in a Sequential does, is opened in turn.

    Raises:
        UsageError: a module given is not below `root`.
    """
    below = {id(module): (name, module) for name, module in root.named_modules()}
    del below[id(root)]
    if units is None:
        return {id(module): module for module in _listed(root)}
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
    """Return, by a parameter's identity, that of the module of its unit.

    It is the innermost unit around it; the root, where it is used in several.
    """
    found: dict[int, int] = {}
    seen: set[tuple[int, int]] = set()

    def visit(module: Module, unit: int) -> None:
        unit = id(module) if id(module) in units else unit
        if (id(module), unit) in seen:
            return
        seen.add((id(module), unit))
        for part, _ in _parts(module):
            if isinstance(part, Module):
                visit(part, unit)
            elif found.setdefault(id(part), unit) != unit:
                found[id(part)] = id(root)

    visit(root, id(root))
    return found


def _listed(module: Module) -> Iterator[Module]:
    """Yield the modules that are units when nothing else is said."""
    for part, listed in _parts(module):
        if isinstance(part, Module) and next(part.parameters(), None) is not None:
            if listed and not _only_lists(part):
                yield part
            else:
                yield from _listed(part)


def _only_lists(module: Module) -> bool:
    """Say whether everything in a module is in its lists of modules."""
    parts = list(_parts(module))
    return all(isinstance(part, Module) and listed for part, listed in parts)


def _parts(module: Module) -> Iterator[tuple[Module | Parameter, bool]]:
    """Yield the modules and parameters that a module holds, and whether in a list or the like."""

    def visit(value: object, listed: bool) -> Iterator[tuple[Module | Parameter, bool]]:
        if isinstance(value, Module | Parameter):
            yield value, listed
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                yield from visit(item, True)

    for value in vars(module).values():
        yield from visit(value, False)
