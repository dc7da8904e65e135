"""The tree of a module's parts: which objects its attributes hold, and under which names."""

from __future__ import annotations

import enum
from abc import ABC
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


def walk(root: ModuleBase) -> list[tuple[str, Item]]:
    """List all modules, parameters, buffers and generators from `root` on, each once, depth first."""
    return cast(list[tuple[str, Item]], members(root))  # without methods there is no Part


def members(root: ModuleBase, *methods: Callable[..., object]) -> list[tuple[str, Item | Part]]:
    """Walk from `root` on, and list a `Part` for a submodule, not for the root, whose class overrides a method.

    Args:
        root: the module.
        methods: methods of the base class. The walk does not enter such a submodule.
    """
    # Training walks the tree in every step, as in zero_grad. So the walk makes a list, which costs less than nested
    # generators, and looks up the kind of an object by its class.
    seen: dict[int, str] = {}
    found: list[tuple[str, Item | Part]] = []

    def visit(name: str, value: Any, kind: _Kind) -> None:
        if kind is _Kind.ITEM or kind is _Kind.MODULE:
            if id(value) in seen:
                return
            if methods and kind is _Kind.MODULE and value is not root and _overrides(value, methods):
                found.append((name, _part(name, value, seen)))
                return
            seen[id(value)] = name
            found.append((name, value))
            if kind is _Kind.ITEM:
                return
        transparent = kind is _Kind.MODULE and value.transparent
        for key, child in _children_of(value, kind, name):
            child_kind = _kind_of(child)
            if child_kind is None:
                continue
            if transparent and child_kind is _Kind.MODULE:
                visit(name, child, child_kind)
            else:
                visit(f"{name}.{key}" if name else str(key), child, child_kind)

    visit("", root, _Kind.MODULE)
    return found


def children(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield the keys and members of a module or container; nothing for other objects.

    Raises:
        UsageError: a set, or an array of objects, holds a part of a module; it is called `name`.
    """
    kind = _kind_of(value)
    if kind is not None:
        yield from ((str(key), item) for key, item in _children_of(value, kind, name))


def _children_of(value: Any, kind: _Kind, name: str) -> Iterable[tuple[object, object]]:
    if kind is _Kind.MODULE:
        return cast(Iterable[tuple[object, object]], vars(value).items())
    if kind is _Kind.MAPPING:
        return cast(Iterable[tuple[object, object]], value.items())
    if kind is _Kind.SEQUENCE:
        return enumerate(value)
    if kind is _Kind.SET:
        _check_holds_no_part(value, "a set", name)
    elif kind is _Kind.ARRAY and value.dtype.kind == "O":
        _check_holds_no_part(value.flat, "an array of objects", name)
    return ()


def _check_holds_no_part(container: Iterable[object], kind: str, name: str) -> None:
    for item in container:
        if isinstance(item, _ITEMS):
            raise UsageError(
                f"attribute {name!r}: {kind} holds a {type(item).__name__}, which has no name "
                "there, so it would be neither trained nor saved. Hold it in a list, tuple or dict."
            )


class _Kind(enum.Enum):
    """The kinds of objects that a walk looks at."""

    MODULE = enum.auto()
    ITEM = enum.auto()
    MAPPING = enum.auto()
    SEQUENCE = enum.auto()
    SET = enum.auto()
    ARRAY = enum.auto()


# Objects of other classes, such as data sets and dataclasses, are not looked into: their members are no parts.
_KINDS: tuple[tuple[tuple[type, ...], _Kind], ...] = (
    ((ModuleBase,), _Kind.MODULE),
    ((Parameter, Buffer, np.random.Generator), _Kind.ITEM),
    ((dict, UserDict, MappingProxyType), _Kind.MAPPING),
    ((list, tuple, deque, UserList), _Kind.SEQUENCE),
    ((set, frozenset), _Kind.SET),
    ((np.ndarray,), _Kind.ARRAY),
)
_kinds_of_classes: dict[type, _Kind | None] = {}


def _kind_of(value: object) -> _Kind | None:
    cls = type(value)
    try:
        return _kinds_of_classes[cls]
    except KeyError:
        kind = next((kind for classes, kind in _KINDS if issubclass(cls, classes)), None)
        _kinds_of_classes[cls] = kind
        return kind


_overriding: dict[tuple[type, tuple[Callable[..., object], ...]], bool] = {}


def _overrides(value: ModuleBase, methods: tuple[Callable[..., object], ...]) -> bool:
    cls = type(value)
    try:
        return _overriding[cls, methods]
    except KeyError:
        found = any(getattr(cls, method.__name__) is not method for method in methods)
        _overriding[cls, methods] = found
        return found


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
