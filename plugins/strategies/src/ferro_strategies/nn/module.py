"""Module, the base class of layers, models, strategies and adapters; replacement of modules in a tree."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from itertools import chain
from types import MappingProxyType
from typing import NamedTuple, Self, TypeAlias

import numpy as np

from .checks import first_few
from .module_checkpoint import ModuleCheckpoint
from .module_tree import Buffer as Buffer
from .module_tree import Item, walk
from .parameter import Parameter
from .summary import summarize
from .trees import Arrays

# A function from the output's gradient to the input's, or to None for an input such as indices. Where input or output
# is a tree of arrays, so is its gradient, with None for a leaf that has none.
Pullback: TypeAlias = Callable[[Arrays], Arrays | None]


class Module(ModuleCheckpoint):
    """A function with parameters that can be differentiated backwards.

    A subclass implements `vjp`. Its parameters, buffers and submodules are the `Parameter`,
    `Buffer` and `Module` objects that its attributes hold, also inside lists, tuples, namedtuples,
    deques and dicts; one inside a set, which has no order, is refused. A
    qualified name consists of attribute names, indices and keys: "layers.0.weight". The order is
    that of definition, depth first; a shared object appears once, under its first name.

    A strategy is a module, too. The methods which it may override, and which are honoured where it
    is a part of another module, are those of `ModuleState` and `ModuleCheckpoint`.

    To move a model to a GPU, assign each parameter's and buffer's `data`:
    `parameter.data = cupy.asarray(parameter.data)`.

    Attributes:
        training: whether layers behave as in training (True at first); see `train`, `eval`.
        transparent: whether this is a wrapper that does not appear in qualified names: "0.weight" of the wrapped module
            has the same name in the wrapper.
    """

    @abstractmethod
    def vjp(self, x: Arrays) -> tuple[Arrays, Pullback]:
        """Compute the output, and the pullback: the function from its gradient to the input's.

        Input and output are an array each, or a tree of arrays: a tuple, list, dict or namedtuple of arrays or of
        trees. The gradient of a tree has the same structure, with None for a leaf without gradient, such as indices or
        a mask; None alone says that no leaf has one.

        The pullback adds to the gradients of the parameters (announced by `Parameter.use()`),
        and returns the gradient with respect to `x`. It keeps activations in its closure, so
        several pullbacks may be in flight, and dropping one frees its activations. It is run at
        most once. `vjp` and the pullback do not modify their arguments; the output may be `x`
        itself or a view of it.

        Raises:
            UsageError: `x` does not have the shape or dtype that the module takes.
        """

    def __call__(self, x: Arrays) -> Arrays:
        """Compute the output alone."""
        return self.vjp(x)[0]

    def parameters(self) -> Iterator[Parameter]:
        """Yield every parameter once, in definition order."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield (qualified name, parameter), each parameter once, in definition order."""
        return ((name, item) for name, item in walk(self) if isinstance(item, Parameter))

    def buffers(self) -> Iterator[Buffer]:
        """Yield every buffer once, in definition order."""
        return (buffer for _, buffer in self.named_buffers())

    def named_buffers(self) -> Iterator[tuple[str, Buffer]]:
        """Yield (qualified name, buffer), each buffer once, in definition order."""
        return ((name, item) for name, item in walk(self) if isinstance(item, Buffer))

    def modules(self) -> Iterator[Module]:
        """Yield this module and all submodules, each once, parents first."""
        return (module for _, module in self.named_modules())

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """Yield (qualified name, module) from ("", self) on, each module once, parents first."""
        return ((name, item) for name, item in walk(self) if isinstance(item, Module))

    def summary(self) -> str:
        """Write a table of all parameters and buffers: shapes, dtypes, the pieces of this rank, and bytes.

        It works with every strategy and communicates nothing; under a pipeline each rank lists its own stages.

        print(model.summary())
        """
        return summarize(self)

    def materialize(self) -> Self:
        """Draw the values of all parameters that were built inside `deferred()`; returns the module."""
        for parameter in self.parameters():
            parameter.materialize()
        return self

    def named_generators(self) -> Iterator[tuple[str, np.random.Generator]]:
        """Yield (qualified name, random generator) of all that modules hold, each once, in definition order."""
        return ((name, item) for name, item in walk(self) if isinstance(item, np.random.Generator))


def replace_modules(root: Module, replacement: Callable[[str, Module], Module]) -> Module:
    """Replace modules wherever the module tree refers to them; return the root.

    Args:
        root: the tree, which is changed in place.
        replacement: a function from qualified name and module to the module that replaces it, or
            to the same module to keep it. It is called once for each module, children before
            parents, the root last; a shared module is replaced everywhere.
    """
    names = {id(module): name for name, module in root.named_modules()}
    new_modules: dict[int, Module] = {}

    def visit(value: object) -> object:
        if isinstance(value, Module):
            if id(value) not in new_modules:
                new_modules[id(value)] = value  # ends the recursion where a module holds itself
                for key, child in list(vars(value).items()):
                    new = visit(child)
                    if new is not child:
                        setattr(value, key, new)
                new_modules[id(value)] = replacement(names[id(value)], value)
            return new_modules[id(value)]
        if isinstance(value, dict | UserDict):
            value.update({key: visit(child) for key, child in value.items()})
        elif isinstance(value, list | UserList | deque):
            for index, child in enumerate(value):
                value[index] = visit(child)
        elif isinstance(value, tuple | MappingProxyType):
            return _rebuilt(value, visit)
        return value

    new_root = visit(root)
    assert isinstance(new_root, Module)
    return new_root


def _rebuilt(value: tuple[object, ...] | MappingProxyType[object, object], visit: Callable[[object], object]) -> object:
    """Make a container that cannot be changed in place again, of the same class, if one of its members is replaced."""
    if isinstance(value, MappingProxyType):
        members = {key: visit(child) for key, child in value.items()}
        return value if all(members[key] is child for key, child in value.items()) else MappingProxyType(members)
    items = [visit(child) for child in value]
    if all(map(operator.is_, items, value)):
        return value
    kind: Callable[..., object] = type(value)
    return kind(*items) if hasattr(value, "_fields") else kind(items)


class TreeChanges(NamedTuple):
    """The difference between a module tree and an earlier snapshot of it; an object that only moved is in neither.

    Attributes:
        added: (qualified name, object) for modules, parameters, buffers and generators that came; those that a new
            module holds, too.
        removed: those that went, with the name that they had.
    """

    added: list[tuple[str, Item]]
    removed: list[tuple[str, Item]]

    def describe(self) -> str:
        """Name the parameters, or else the modules, that came and went, for a message."""

        def names(items: list[tuple[str, Item]]) -> str:
            wanted = [name for name, item in items if isinstance(item, Parameter)] or [name for name, _ in items]
            return ", ".join(first_few([repr(name) for name in wanted]))

        parts = [f"{names(items)} {verb}" for items, verb in zip(self, ("came", "went"), strict=True) if items]
        return " and ".join(parts) or "only the order or the place of some parts changed"


class TreeSnapshot:
    """The members of all containers in a module tree, to notice at little cost that the tree has changed.

    Containers are modules and the collections that they hold. Members are compared by identity, in one pass that calls
    no Python function.
    """

    _END = object()

    def __init__(self, root: Module) -> None:
        self._root = root
        self._items = walk(root)
        self._containers: list[Iterable[object]] = []
        seen: set[int] = set()

        def visit(value: object) -> None:
            if isinstance(value, Module | dict | list | tuple | deque | UserDict | UserList) and id(value) not in seen:
                seen.add(id(value))
                members = vars(value) if isinstance(value, Module) else value
                container = members.values() if isinstance(members, dict | UserDict) else members
                self._containers.append(container)
                for member in container:
                    visit(member)

        visit(root)
        self._members = (*chain.from_iterable(self._containers), self._END)

    def is_current(self) -> bool:
        """Say whether every container still holds the same objects."""
        present = chain(chain.from_iterable(self._containers), (self._END,))
        return all(map(operator.is_, present, self._members))

    def changes(self) -> TreeChanges:
        """Name the modules, parameters, buffers and generators that came and went since the snapshot."""
        before = {id(item) for _, item in self._items}
        now = walk(self._root)
        present = {id(item) for _, item in now}
        return TreeChanges(
            added=[(name, item) for name, item in now if id(item) not in before],
            removed=[(name, item) for name, item in self._items if id(item) not in present],
        )

    def __deepcopy__(self, memo: dict[int, object]) -> TreeSnapshot:
        return TreeSnapshot(deepcopy(self._root, memo))
