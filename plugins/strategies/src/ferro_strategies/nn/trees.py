"""Trees of arrays: the inputs, outputs and gradients of a module that takes or returns more than one array.

A tree is an array, or a tuple, list, dict or namedtuple of trees. Arrays are its leaves; any other object, such as None
or a number, is a leaf, too. The gradient of a tree has the tree's structure, with None at the leaves that have no
gradient; None alone stands for a whole tree of these.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ferro.errors import UsageError

from .arrays import quiet_overflow, wide_dtype

# An array, or a tuple, list, dict or namedtuple of these. The type is open, so that a module may declare which of them
# it takes: an argument of type Array, or tuple[Array, Array], would not be a valid override of a union.
Arrays: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Structure:
    """The containers of a tree, without its leaves.

    Attributes:
        kind: tuple, list, dict, OrderedDict or a namedtuple's class; None for a leaf.
        keys: indices of a sequence, or keys of a dict in their order.
        parts: the structures of the members, in the order of `keys`.
    """

    kind: type | None = None
    keys: tuple[Hashable, ...] = ()
    parts: tuple[Structure, ...] = ()

    def flatten(self, tree: Arrays) -> list[Any]:
        """List the leaves of a tree of this structure, in this structure's order.

        None instead of a container stands for None at all of its leaves. A list may stand for a tuple and the other way
        round.

        Raises:
            UsageError: the tree has another structure.
        """
        result: list[Any] = []
        self._collect(tree, result)
        return result

    def unflatten(self, leaves: Sequence[Any]) -> Arrays:
        """Build a tree of this structure from its leaves: the inverse of `flatten`."""
        remaining = iter(leaves)
        tree = self._build(remaining)
        assert next(remaining, remaining) is remaining, "more leaves than the structure has"
        return tree

    def _collect(self, tree: Arrays, result: list[Any]) -> None:
        if self.kind is None:
            if _kind(tree) is not None:
                raise UsageError(f"expected one array, got {describe(tree)}.")
            result.append(tree)
        elif tree is None:
            for part in self.parts:
                part._collect(None, result)
        else:
            kind = _kind(tree)
            alike = kind is not None and issubclass(kind, dict) == issubclass(self.kind, dict)
            if not alike or len(tree) != len(self.keys) or set(_keys(tree)) != set(self.keys):
                raise UsageError(f"expected {self}, got {describe(tree)}.")
            for key, part in zip(self.keys, self.parts, strict=True):
                part._collect(tree[key], result)

    def _build(self, leaves: Iterator[Any]) -> Arrays:
        if self.kind is None:
            return next(leaves)
        members = [part._build(leaves) for part in self.parts]
        build: Callable[..., Arrays] = self.kind
        if issubclass(self.kind, dict):
            return build(zip(self.keys, members, strict=True))
        return build(*members) if hasattr(self.kind, "_fields") else build(members)

    def __str__(self) -> str:
        if self.kind is None:
            return "array"
        return _write(self.kind, self.keys, [str(part) for part in self.parts])


LEAF = Structure()


def structure(tree: Arrays) -> Structure:
    """Describe the containers of a tree; two trees are alike if their structures are equal."""
    kind = _kind(tree)
    if kind is None:
        return LEAF
    keys = _keys(tree)
    return Structure(kind, keys, tuple(structure(tree[key]) for key in keys))


def leaves(tree: Arrays) -> list[Any]:
    """List the leaves, first to last; a tree that is None has one leaf, None."""
    if type(tree) is np.ndarray:
        return [tree]
    return structure(tree).flatten(tree)


def map_leaves(function: Callable[..., Any], tree: Arrays, *others: Arrays) -> Arrays:
    """Build a tree of the function's results on each leaf, and on the leaves of the other trees at the same place.

    The function is not called where `tree` has None; the result has None there, too.

    Args:
        function: takes one leaf of each tree.
        tree: gives the structure of the result.
        others: trees of the same structure, or None for None at all leaves.

    Raises:
        UsageError: one of the others has another structure.
    """
    if type(tree) is np.ndarray and not others:
        return function(tree)
    shape = structure(tree)
    columns = [shape.flatten(each) for each in (tree, *others)]
    return shape.unflatten([None if row[0] is None else function(*row) for row in zip(*columns, strict=True)])


def describe(tree: Arrays) -> str:
    """Write a tree for a message: "float32 (2, 3)" for an array, "{'x': float32 (2, 3), 'mask': None}" for a dict."""
    kind = _kind(tree)
    if kind is not None:
        keys = _keys(tree)
        return _write(kind, keys, [describe(tree[key]) for key in keys])
    if tree is None:
        return "None"
    if hasattr(tree, "shape") and hasattr(tree, "dtype") and not isinstance(tree, np.generic):
        return f"{tree.dtype} {tuple(tree.shape)}"
    return f"a {type(tree).__name__}"


@dataclass(frozen=True, slots=True)
class TreeShapes:
    """The shapes of a tree's leaves, to check a gradient by when the tree itself is gone.

    Attributes:
        structure: the tree's containers.
        shapes: one shape for each leaf; None for a leaf that is no array, and so has no gradient.
    """

    structure: Structure
    shapes: tuple[tuple[int, ...] | None, ...]

    def __str__(self) -> str:
        return str(self.structure.unflatten([_Word("None" if shape is None else shape) for shape in self.shapes]))


# The shape of one array, or the shapes of a tree of several.
Shapes: TypeAlias = tuple[int, ...] | TreeShapes


def shapes_of(tree: Arrays) -> Shapes:
    """Keep what a check of the tree's gradient needs: the shape of an array, or the shapes of a tree."""
    if type(tree) is np.ndarray:
        array_shape: tuple[int, ...] = tree.shape
        return array_shape
    whole = structure(tree)
    if whole.kind is None and hasattr(tree, "shape"):
        shape: tuple[int, ...] = tree.shape
        return shape
    return TreeShapes(whole, tuple(getattr(leaf, "shape", None) for leaf in whole.flatten(tree)))


def has_gradient(grads: Arrays) -> bool:
    """Say whether a tree of gradients has one at any leaf."""
    if type(grads) is np.ndarray:
        return True
    return any(leaf is not None for leaf in leaves(grads))


def quiet_overflow_in(tree: Arrays) -> AbstractContextManager[object]:
    """Make a context as `quiet_overflow` does, if a leaf of the tree is in half precision."""
    for leaf in leaves(tree):
        if hasattr(leaf, "dtype") and wide_dtype(leaf.dtype) != leaf.dtype and leaf.dtype.kind not in "iub":
            return quiet_overflow(leaf.dtype)
    return nullcontext()


class _Word:
    """A text that is written without quotes inside a container's repr."""

    def __init__(self, text: object) -> None:
        self._text = text

    def __repr__(self) -> str:
        return str(self._text)


def _kind(tree: Arrays) -> type | None:
    """Return the container's class, or None for a leaf."""
    kind = type(tree)
    if kind in (tuple, list, dict, OrderedDict) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        return kind
    return None


def _keys(tree: Arrays) -> tuple[Hashable, ...]:
    return tuple(tree) if isinstance(tree, dict) else tuple(range(len(tree)))


def _write(kind: type, keys: tuple[Hashable, ...], members: list[str]) -> str:
    if issubclass(kind, dict):
        return "{" + ", ".join(f"{key!r}: {member}" for key, member in zip(keys, members, strict=True)) + "}"
    if kind is list:
        return f"[{', '.join(members)}]"
    if kind is tuple:
        return f"({', '.join(members)}{',' if len(members) == 1 else ''})"
    fields: tuple[str, ...] = getattr(kind, "_fields", ())
    return f"{kind.__name__}({', '.join(f'{name}={member}' for name, member in zip(fields, members, strict=True))})"
