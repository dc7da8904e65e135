"""Module, the base class of layers, models, strategies and adapters; and Buffer."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np

from ferro.errors import UsageError

from .arrays import Array, namespace_of
from .checks import first_few
from .parameter import Parameter
from .trees import Arrays

# A function from the output's gradient to the input's, or to None for an input such as indices. Where input or output
# is a tree of arrays, so is its gradient, with None for a leaf that has none.
Pullback: TypeAlias = Callable[[Arrays], Arrays | None]

# The state of a random generator: nested dicts of strings and integers, whose form NumPy does not specify.
GeneratorState: TypeAlias = Mapping[str, Any]


class Module(ABC):
    """A function with parameters that can be differentiated backwards.

    A subclass implements `vjp`. Its parameters, buffers and submodules are the `Parameter`,
    `Buffer` and `Module` objects that its attributes hold, also inside lists, tuples and dicts. A
    qualified name consists of attribute names, indices and keys: "layers.0.weight". The order is
    that of definition, depth first; a shared object appears once, under its first name.

    To move a model to a GPU, assign each parameter's and buffer's `data`:
    `parameter.data = cupy.asarray(parameter.data)`.

    Attributes:
        training: whether layers behave as in training (True at first); see `train`, `eval`.
        transparent: whether this is a wrapper that does not appear in qualified names: "0.weight" of the wrapped module
            has the same name in the wrapper.
    """

    training: bool = True
    transparent: ClassVar[bool] = False

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
        return ((name, item) for name, item in _walk(self) if isinstance(item, Parameter))

    def buffers(self) -> Iterator[Buffer]:
        """Yield every buffer once, in definition order."""
        return (buffer for _, buffer in self.named_buffers())

    def named_buffers(self) -> Iterator[tuple[str, Buffer]]:
        """Yield (qualified name, buffer), each buffer once, in definition order."""
        return ((name, item) for name, item in _walk(self) if isinstance(item, Buffer))

    def modules(self) -> Iterator[Module]:
        """Yield this module and all submodules, each once, parents first."""
        return (module for _, module in self.named_modules())

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """Yield (qualified name, module) from ("", self) on, each module once, parents first."""
        return ((name, item) for name, item in _walk(self) if isinstance(item, Module))

    def named_generators(self) -> Iterator[tuple[str, np.random.Generator]]:
        """Yield (qualified name, random generator) of all that modules hold, each once, in definition order."""
        return ((name, item) for name, item in _walk(self) if isinstance(item, np.random.Generator))

    def train(self) -> Self:
        """Set this module and all submodules to training; returns the module."""
        for module in self.modules():
            module.training = True
        return self

    def eval(self) -> Self:
        """Set this module and all submodules to evaluation; returns the module."""
        for module in self.modules():
            module.training = False
        return self

    def zero_grad(self) -> None:
        """Set every parameter's gradient to None."""
        for parameter in self.parameters():
            parameter.zero_grad()

    def state_dict(self) -> dict[str, Array]:
        """Copy all parameters and buffers into a dict, by qualified name."""
        return {name: holder.data.copy() for name, holder in _state(self)}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Copy the arrays of `state` into the parameters and buffers, in place.

        Raises:
            UsageError: a name is missing or unexpected, or a shape or dtype differs; the first
                few of each are listed, and nothing was changed.
        """
        own = dict(_state(self))
        missing = [f"missing {name!r}" for name in own if name not in state]
        unexpected = [f"unexpected {name!r}" for name in state if name not in own]
        unlike = []
        for name, holder in own.items():
            if name in state:
                here, there = holder.data, state[name]
                if (here.shape, here.dtype) != (there.shape, there.dtype):
                    unlike.append(f"{name!r} is {here.dtype} {here.shape}, given {there.dtype} {there.shape}")
        faults = [*first_few(missing), *first_few(unexpected), *first_few(unlike)]
        if faults:
            raise UsageError(
                f"load_state_dict: the state does not fit {type(self).__name__}: "
                f"{'; '.join(faults)}. Nothing was loaded."
            )
        for name, holder in own.items():
            holder.data[...] = namespace_of(holder.data).asarray(state[name])

    def generator_state_dict(self) -> dict[str, GeneratorState]:
        """Copy the states of all random generators, such as those of Dropout, by qualified name.

        Together with `state_dict`, and the optimizer's and the sampler's, this is what a training goes on from, bit for
        bit. Ranks have different generators, so each saves its own. A state consists of dicts, strings and integers,
        which `json.dumps` takes.
        """
        return {name: generator.bit_generator.state for name, generator in self.named_generators()}

    def load_generator_state_dict(self, state: Mapping[str, GeneratorState]) -> None:
        """Set the states of all random generators.

        Raises:
            UsageError: a name is missing or unexpected, or a generator is of another kind. Nothing was changed.
        """
        own = dict(self.named_generators())
        faults = [f"missing {name!r}" for name in own if name not in state]
        faults += [f"unexpected {name!r}" for name in state if name not in own]
        for name in own.keys() & state.keys():
            here, there = own[name].bit_generator.state["bit_generator"], state[name].get("bit_generator")
            if here != there:
                faults.append(f"{name!r} is a {here}, given a {there}")
        if faults:
            raise UsageError(
                f"load_generator_state_dict: the state does not fit {type(self).__name__}: "
                f"{'; '.join(first_few(faults))}. Nothing was loaded."
            )
        for name, generator in own.items():
            generator.bit_generator.state = state[name]


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


_Item: TypeAlias = Module | Parameter | Buffer | np.random.Generator


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
        if isinstance(value, dict):
            value.update({key: visit(child) for key, child in value.items()})
        elif isinstance(value, list):
            value[:] = map(visit, value)
        elif type(value) is tuple:
            items = tuple(map(visit, value))
            return value if all(map(operator.is_, items, value)) else items
        return value

    new_root = visit(root)
    assert isinstance(new_root, Module)
    return new_root


def _state(root: Module) -> Iterator[tuple[str, Parameter | Buffer]]:
    return ((name, item) for name, item in _walk(root) if isinstance(item, Parameter | Buffer))


class TreeSnapshot:
    """The members of all containers in a module tree, to notice at little cost that the tree has changed.

    Containers are modules, lists, tuples and dicts. Members are compared by identity, in one pass that calls no Python
    function.
    """

    _END = object()

    def __init__(self, root: Module) -> None:
        self._root = root
        self._containers: list[Iterable[object]] = []
        seen: set[int] = set()

        def visit(value: object) -> None:
            if isinstance(value, Module | dict | list | tuple) and id(value) not in seen:
                seen.add(id(value))
                members = vars(value) if isinstance(value, Module) else value
                container = members.values() if isinstance(members, dict) else members
                self._containers.append(container)
                for member in container:
                    visit(member)

        visit(root)
        self._members = (*chain.from_iterable(self._containers), self._END)

    def is_current(self) -> bool:
        """Say whether every container still holds the same objects."""
        present = chain(chain.from_iterable(self._containers), (self._END,))
        return all(map(operator.is_, present, self._members))

    def __deepcopy__(self, memo: dict[int, object]) -> TreeSnapshot:
        return TreeSnapshot(deepcopy(self._root, memo))


def _walk(root: Module) -> Iterator[tuple[str, _Item]]:
    """Yield all modules, parameters, buffers and generators from `root` on, each once, depth first."""
    seen: set[int] = set()

    def visit(name: str, value: object) -> Iterator[tuple[str, _Item]]:
        if isinstance(value, Module | Parameter | Buffer | np.random.Generator):
            if id(value) in seen:
                return
            seen.add(id(value))
            yield name, value
        for key, child in _children(value):
            if isinstance(value, Module) and value.transparent and isinstance(child, Module):
                yield from visit(name, child)
            else:
                yield from visit(f"{name}.{key}" if name else key, child)

    return visit("", root)


def _children(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Module):
        yield from vars(value).items()
    elif isinstance(value, dict):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(index), item) for index, item in enumerate(value))
