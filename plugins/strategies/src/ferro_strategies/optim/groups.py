"""Parameter groups: parameters of one optimizer with settings of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import GeneratorType
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, overload

from ferro.errors import UsageError

from ..nn.module import Module
from ..nn.parameter import Parameter

# A setting of an optimizer; each keeps the kind of its default.
Setting: TypeAlias = float | bool | tuple[float, ...]
# The settings of one group, as updates read them.
Settings: TypeAlias = Mapping[str, Any]
# The parameters of an optimizer: a module, its parameters, or groups {"params": …, "lr": …}.
Parameters: TypeAlias = Module | Iterable[Parameter] | Iterable[Mapping[str, object]]

T = TypeVar("T")


class ParameterGroup:
    """Parameters that an optimizer updates with the same settings.

    `group["lr"]` reads a setting, `group["lr"] = 0.1` changes it.

    Attributes:
        parameters: the parameters, in the order given.
        settings: all settings; change them by assignment to `group[name]`.
    """

    def __init__(
        self, optimizer: str, parameters: list[Parameter], settings: Settings, check: Callable[[Settings], None]
    ) -> None:
        self.parameters = parameters
        self.settings: dict[str, Any] = dict(settings)
        self._optimizer = optimizer
        self._check = check

    def __getitem__(self, name: str) -> Any:
        """Return a setting, or the parameters for "params"."""
        return self.parameters if name == "params" else self.settings[name]

    def __setitem__(self, name: str, value: Setting) -> None:
        """Change a setting.

        Raises:
            UsageError: the optimizer has no such setting, or the value is out of its range; nothing was changed.
        """
        self.update({name: value})

    def update(self, changes: Mapping[str, object]) -> None:
        """Change several settings, or none if one of them is wrong."""
        changed = {**self.settings, **_converted(self._optimizer, self.settings, changes)}
        self._check(changed)
        self.settings.update(changed)

    def __repr__(self) -> str:
        return f"ParameterGroup({len(self.parameters)} parameters, {self.settings})"


class HasGroups(Protocol):
    """An object with parameter groups, of which each has the same settings."""

    groups: list[ParameterGroup]


class GroupSetting(Generic[T]):
    """An attribute of an optimizer that stands for one setting of all its groups.

    It reads the first group's value. An assignment changes all groups, and is refused where they differ, as it would
    make them equal.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, optimizer: None, owner: type) -> GroupSetting[T]: ...

    @overload
    def __get__(self, optimizer: HasGroups, owner: type) -> T: ...

    def __get__(self, optimizer: HasGroups | None, owner: type) -> T | GroupSetting[T]:
        """Return the value in the first group."""
        if optimizer is None:
            return self
        value: T = optimizer.groups[0].settings[self._name]
        return value

    def __set__(self, optimizer: HasGroups, value: T) -> None:
        """Set the value in all groups.

        Raises:
            UsageError: the groups have different values, or the value is out of its range; nothing was changed.
        """
        present = [group.settings[self._name] for group in optimizer.groups]
        if any(other != present[0] for other in present):
            raise UsageError(
                f"{type(optimizer).__name__}: its groups have {self._name} {present}. Assign to "
                f'optimizer.groups[i]["{self._name}"], one by one.'
            )
        for group in optimizer.groups:
            group.update({self._name: value})


def make_groups(
    optimizer: str, parameters: Parameters, defaults: Settings, check: Callable[[Settings], None]
) -> list[ParameterGroup]:
    """Make the groups of an optimizer, at least one; they may be empty, as on a rank whose stage is not trained.

    Args:
        optimizer: the optimizer's name, for messages.
        parameters: see `Parameters`.
        defaults: all settings; those that a group leaves out have these values.
        check: refuses settings out of their range.

    Raises:
        UsageError: an iterator is used up, a parameter is given twice, an item is no Parameter, or a setting is unknown
            or out of its range.
    """
    _check_not_used_up(optimizer, parameters)
    items: list[object] = [{"params": parameters}] if isinstance(parameters, Module | Parameter) else list(parameters)
    if not items or not all(isinstance(item, Mapping) for item in items):
        items = [{"params": items}]
    defaults = _converted(optimizer, defaults, defaults)
    groups: list[ParameterGroup] = []
    seen: set[int] = set()
    for index, item in enumerate(items):
        assert isinstance(item, Mapping)
        if "params" not in item:
            raise UsageError(f'{optimizer}: group {index} has no "params", only {sorted(item)}.')
        where = f"group {index}, " if len(items) > 1 else ""
        held = _parameters(optimizer, where, item["params"], seen)
        group = ParameterGroup(optimizer, held, defaults, check)
        group.update({name: value for name, value in item.items() if name != "params"})
        groups.append(group)
    return groups


def _parameters(optimizer: str, where: str, given: object, seen: set[int]) -> list[Parameter]:
    _check_not_used_up(optimizer, given)
    if isinstance(given, Parameter):
        given = [given]
    elif isinstance(given, Module):
        given = given.parameters()
    if not isinstance(given, Iterable):
        raise UsageError(f"{optimizer}: {where}params is a {type(given).__name__}, not parameters.")
    held: list[Parameter] = []
    for index, item in enumerate(given):
        if not isinstance(item, Parameter):
            raise UsageError(f"{optimizer}: {where}item {index} is a {type(item).__name__}, not a Parameter.")
        if id(item) in seen:
            raise UsageError(f"{optimizer}: {where}item {index}, {item!r}, is given twice.")
        seen.add(id(item))
        held.append(item)
    return held


def _check_not_used_up(optimizer: str, given: object) -> None:
    """Refuse a generator that has ended: it would give no parameters, though there are some."""
    if isinstance(given, GeneratorType) and given.gi_frame is None:
        raise UsageError(
            f"{optimizer}: there are no parameters: the iterator given was read to its end before. Call "
            "module.parameters() again, or pass the module."
        )


def _converted(optimizer: str, kinds: Settings, changes: Mapping[str, object]) -> dict[str, Setting]:
    """Convert settings to the kinds of the present ones: numbers of NumPy become those of Python."""
    made: dict[str, Setting] = {}
    for name, value in changes.items():
        if name not in kinds:
            raise UsageError(f"{optimizer} has no setting {name!r}. Its settings are {', '.join(sorted(kinds))}.")
        try:
            made[name] = _like(kinds[name], value)
        except (TypeError, ValueError) as error:
            kind = "" if value is kinds[name] else f", not like {kinds[name]!r}"
            raise UsageError(f"{optimizer}: {name} is {value!r}{kind}.") from error
    return made


def _like(kind: Setting, value: Any) -> Setting:
    if isinstance(kind, bool):
        return bool(value)
    if isinstance(kind, tuple | list):  # a list comes from JSON, say
        made = tuple(float(item) for item in value)
        if len(made) != len(kind):
            raise ValueError
        return made
    return float(value)
