"""Checks of what a stage's module returns: its outputs, and the gradients of its inputs."""

from __future__ import annotations

import numpy as np

from ferro import UsageError

from ...nn.checks import check_input_gradient
from ...nn.module import Module
from ...nn.trees import LEAF, Arrays, Shapes, Structure, TreeShapes, describe, has_gradient, leaves, structure
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
        self._name = f"stage {number} ({type(module).__name__})"
        self._number = number
        self._first: Arrays = None
        self._kinds: tuple[Structure, tuple[object, ...]] | None = None

    def output(self, y: Arrays, microbatch: int) -> None:
        """Refuse an output that the next stage cannot take.

        Raises:
            UsageError: a leaf is no array, or the first microbatch's output was of another kind.
        """
        kinds = _kinds(y)
        if kinds == self._kinds:
            return
        for leaf in leaves(y):
            if problem := check_leaf(leaf):
                raise UsageError(f"{self._name} returned for microbatch {microbatch} {problem}.")
        if self._kinds is not None:
            raise UsageError(
                f"{self._name} returned {describe(y)} for microbatch {microbatch}, and {self._first} for an earlier "
                "one. Containers and dtypes must be equal for all microbatches."
            )
        self._kinds, self._first = kinds, describe(y)

    def input_gradient(self, grad_x: Arrays, x: InputOfStage, microbatch: int) -> Arrays:
        """Return the gradient of an input in the input's own containers; refuse one that does not fit.

        Raises:
            UsageError: the gradient does not fit the input, or there is none.
        """
        check_input_gradient(f"{self._name}, microbatch {microbatch}", grad_x, x.shapes)
        if not has_gradient(grad_x):
            if x.differentiable:
                raise UsageError(
                    f"{self._name} has no gradient for its input, and stage {self._number - 1} needs it. Only the "
                    "first stage, or one whose input has no floating-point numbers, may return None."
                )
            return None
        if type(grad_x) is not np.ndarray and isinstance(x.shapes, TreeShapes):
            containers = x.shapes.structure
            grad_x = containers.unflatten(containers.flatten(grad_x))
        for leaf in leaves(grad_x):
            if leaf is not None and not is_differentiable(leaf):
                raise UsageError(
                    f"{self._name} returned for microbatch {microbatch} a gradient of dtype {leaf.dtype}. A gradient "
                    "has floating-point numbers, or is None."
                )
        return grad_x


class InputOfStage:
    """What is kept of a stage's input to check its gradient.

    Attributes:
        shapes: the shapes of its arrays.
        differentiable: whether any of these may have a gradient.
    """

    __slots__ = ("differentiable", "shapes")

    def __init__(self, x: Arrays, shapes: Shapes) -> None:
        self.shapes = shapes
        self.differentiable = any(map(is_differentiable, leaves(x)))


def _kinds(tree: Arrays) -> tuple[Structure, tuple[object, ...]]:
    if type(tree) is np.ndarray:
        return LEAF, (tree.dtype,)
    whole = structure(tree)
    return whole, tuple(getattr(leaf, "dtype", None) for leaf in whole.flatten(tree))
