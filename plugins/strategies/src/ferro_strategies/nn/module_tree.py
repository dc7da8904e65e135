"""The tree of a module's parts: which objects its attributes hold, and under which names."""

from __future__ import annotations

import enum
from abc import ABC
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np

from ferro.errors import UsageError

from .arrays import Array, namespace_of
from .parameter import Parameter


class ModuleBase(ABC):  # noqa: B024  # Module adds the abstract method
    """The part of `Module` that a walk through the tree needs.

    Attributes:
        training: whether layers behave as in training (True at first); see `train`, `eval`.
        transparent: whether this is a wrapper that does not appear in qualified names: "0.weight" of the wrapped module
            has the same name in the wrapper.
    """

    training: bool = True
    transparent: ClassVar[bool] = False


class Buffer:
    """An array of a module's state that is not trained, such as running statistics.

    Attributes:
        data: NumPy or CuPy array of any dtype; layers change it in place.
    """

    def __init__(self, data: Array) -> None:
        namespace_of(data)
        self.data = data

    def __repr__(self) -> str:
        return f"Buffer(shape={self.data.shape}, dtype={self.data.dtype})"


Item: TypeAlias = ModuleBase | Parameter | Buffer | np.random.Generator
_ITEMS = (ModuleBase, Parameter, Buffer, np.random.Generator)


@dataclass(frozen=True, slots=True)
class Part:
    """A submodule that answers for all that it holds, because its class overrides the method in question.

    Attributes:
        name: qualified name.
        module: the submodule.
        aliases: names, in the submodule, of parameters and buffers that the tree holds elsewhere before it, and the
            names there.
    """

    name: str
    module: ModuleBase
    aliases: Mapping[str, str]

    @property
    def prefix(self) -> str:
        """The beginning of the qualified names of all that the submodule holds."""
        return f"{self.name}." if self.name else ""


def walk(root: ModuleBase) -> Iterator[tuple[str, Item]]:
    """Yield all modules, parameters, buffers and generators from `root` on, each once, depth first."""
    return ((name, item) for name, item in members(root) if not isinstance(item, Part))


def members(root: ModuleBase, *methods: Callable[..., object]) -> Iterator[tuple[str, Item | Part]]:
    """Walk from `root` on, and yield a `Part` for a submodule, not for the root, whose class overrides a method.

    Args:
        root: the module.
        methods: methods of the base class. The walk does not enter a submodule that overrides one of them.
    """
    seen: dict[int, str] = {}

    def visit(name: str, value: object) -> Iterator[tuple[str, Item | Part]]:
        if isinstance(value, _ITEMS):
            if id(value) in seen:
                return
            if methods and isinstance(value, ModuleBase) and value is not root and _overrides(type(value), methods):
                yield name, _part(name, value, seen)
                return
            seen[id(value)] = name
            yield name, value
        for key, child in children(value, name):
            if isinstance(value, ModuleBase) and value.transparent and isinstance(child, ModuleBase):
                yield from visit(name, child)
            else:
                yield from visit(f"{name}.{key}" if name else key, child)

    return visit("", root)


def children(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield the keys and members of a module or container; nothing for other objects.

    Raises:
        UsageError: a set, or an array of objects, holds a part of a module; it is called `name`.
    """
    kind = _container_kind(type(value))  # type: ignore[arg-type]  # classes are hashable
    if kind is _Kind.MODULE:
        yield from vars(value).items()
    elif kind is _Kind.MAPPING:
        yield from ((str(key), item) for key, item in cast(Mapping[object, object], value).items())
    elif kind is _Kind.SEQUENCE:
        yield from ((str(index), item) for index, item in enumerate(cast(Sequence[object], value)))
    elif kind is _Kind.SET:
        _check_holds_no_part(cast(Iterable[object], value), "a set", name)
    elif kind is _Kind.ARRAY and cast(Array, value).dtype.kind == "O":
        _check_holds_no_part(cast(Array, value).flat, "an array of objects", name)


def _check_holds_no_part(container: Iterable[object], kind: str, name: str) -> None:
    for item in container:
        if isinstance(item, _ITEMS):
            raise UsageError(
                f"attribute {name!r}: {kind} holds a {type(item).__name__}, which has no name "
                "there, so it would be neither trained nor saved. Hold it in a list, tuple or dict."
            )


class _Kind(enum.Enum):
    """The kinds of objects that a walk looks into."""

    MODULE = enum.auto()
    MAPPING = enum.auto()
    SEQUENCE = enum.auto()
    SET = enum.auto()
    ARRAY = enum.auto()


@cache
def _container_kind(kind: type[Any]) -> _Kind | None:
    for classes, found in _KINDS:
        if issubclass(kind, classes):
            return found
    return None


# Other classes, such as data sets and dataclasses, are not looked into: their members are no parts of a module.
_KINDS: tuple[tuple[tuple[type, ...], _Kind], ...] = (
    ((ModuleBase,), _Kind.MODULE),
    ((dict, UserDict, MappingProxyType), _Kind.MAPPING),
    ((list, tuple, deque, UserList), _Kind.SEQUENCE),
    ((set, frozenset), _Kind.SET),
    ((np.ndarray,), _Kind.ARRAY),
)


@cache
def _overrides(kind: type, methods: tuple[Callable[..., object], ...]) -> bool:
    return any(getattr(kind, method.__name__) is not method for method in methods)


def _part(name: str, module: ModuleBase, seen: dict[int, str]) -> Part:
    """Describe a part, and note what it holds as seen."""
    aliases = {}
    for inner, item in walk(module):
        if id(item) in seen:
            aliases[inner] = seen[id(item)]
        else:
            seen[id(item)] = f"{name}.{inner}" if name and inner else name or inner
    return Part(name, module, aliases)


def route(names: Iterable[str], parts: Sequence[Part]) -> tuple[list[list[str]], list[str]]:
    """Assign names to the parts under whose name they lie, the longest that fits.

    Returns:
        For each part its names, without the prefix; and the names that belong to none.
    """
    routed: list[list[str]] = [[] for _ in parts]
    rest: list[str] = []
    order = sorted(range(len(parts)), key=lambda position: -len(parts[position].prefix))
    for name in names:
        fitting = next((position for position in order if name.startswith(parts[position].prefix)), None)
        if fitting is None:
            rest.append(name)
        else:
            routed[fitting].append(name[len(parts[fitting].prefix) :])
    return routed, rest
