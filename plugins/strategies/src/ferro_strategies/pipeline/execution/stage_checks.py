"""Checks of what a stage's module returns: its outputs, and the gradients of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ferro import UsageError

from ...nn.checks import check_input_gradient
from ...nn.module import Module
from ...nn.trees import Arrays, Shapes, Structure, TreeShapes, has_gradient, leaves, shapes_of, structure
from .loss import is_differentiable
from .packed_trees import check_leaf


class StageChecks:
    """The checks of one stage in one pass.

    All microbatches of a pass must give outputs of the containers and dtypes of the first one's. Shapes may differ,
    because microbatches may.

    Args:
        number: the stage.
        module: the stage's module.
    """

    def __init__(self, number: int, module: Module) -> None:
        self._number, self._module = number, module
        self._first: _Kinds | None = None
        self._dtype: np.dtype | None = None

    def output(self, y: Arrays, microbatch: int) -> None:
        """Refuse an output that the next stage cannot take.

        Raises:
            UsageError: a leaf is no array, or the first microbatch's output was of another kind.
        """
        if type(y) is np.ndarray and y.dtype is self._dtype:  # the usual case
            return
        kinds = _Kinds.of(y)
        if kinds == self._first:
            return
        for leaf in leaves(y):
            if problem := check_leaf(leaf):
                raise UsageError(f"{self._name()} returned for microbatch {microbatch} {problem}.")
        if self._first is not None:
            raise UsageError(
                f"{self._name()} returned {kinds} for microbatch {microbatch}, and {self._first} for an earlier one. "
                "Containers and dtypes must be equal for all microbatches."
            )
        self._first = kinds
        self._dtype = y.dtype if type(y) is np.ndarray else None

    def input_gradient(self, grad_x: Arrays, x: InputOfStage, microbatch: int) -> Arrays:
        """Return the gradient of an input in the input's own containers; refuse one that does not fit.

        Raises:
            UsageError: the gradient does not fit the input, or there is none.
        """
        if type(grad_x) is np.ndarray and grad_x.shape == x.shapes and grad_x.dtype.kind not in "iub":
            return grad_x  # the usual case
        check_input_gradient(f"{self._name()}, microbatch {microbatch}", grad_x, x.shapes)
        if not has_gradient(grad_x):
            if x.differentiable:
                raise UsageError(
                    f"{self._name()} has no gradient for its input, and stage {self._number - 1} needs it. Only the "
                    "first stage, or one whose input has no floating-point numbers, may return None."
                )
            return None
        if isinstance(x.shapes, TreeShapes):
            containers = x.shapes.structure
            grad_x = containers.unflatten(containers.flatten(grad_x))
        for leaf in leaves(grad_x):
            if leaf is not None and not is_differentiable(leaf):
                raise UsageError(
                    f"{self._name()} returned for microbatch {microbatch} a gradient of dtype {leaf.dtype}. A gradient "
                    "has floating-point numbers, or is None."
                )
        return grad_x

    def _name(self) -> str:
        return f"stage {self._number} ({type(self._module).__name__})"


class InputOfStage:
    """What is kept of a stage's input to check its gradient.

    Attributes:
        shapes: the shapes of its arrays.
        differentiable: whether any of these may have a gradient.
    """

    __slots__ = ("differentiable", "shapes")

    def __init__(self, x: Arrays) -> None:
        self.shapes: Shapes = shapes_of(x)
        self.differentiable = any(map(is_differentiable, leaves(x)))


@dataclass(frozen=True, slots=True)
class _Kinds:
    """The containers of a tree, and the dtypes of its arrays."""

    containers: Structure
    dtypes: tuple[np.dtype | None, ...]

    @classmethod
    def of(cls, tree: Arrays) -> _Kinds:
        containers = structure(tree)
        return cls(containers, tuple(getattr(leaf, "dtype", None) for leaf in containers.flatten(tree)))

    def __str__(self) -> str:
        return f"{self.containers} of {', '.join(map(str, self.dtypes))}"
