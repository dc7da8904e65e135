"""Passes: what a rank does for each action, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

from ferro import UsageError

from ..nn.arrays import Array, namespace_of
from ..nn.module import Module, Pullback
from ..nn.parameter import deferring
from .mail import Mail
from .microbatches import Batch, cut, shares
from .routes import Plan
from .schedule import Action, Kind

# From the last stage's output and the targets of a microbatch: the loss, a mean over the
# targets' elements, and its gradient with respect to the output.
Loss: TypeAlias = Callable[[Array, Array], tuple[float, Array]]


class Pass(Protocol):
    """One way through the pipeline.

    Attributes:
        loss: this rank's part of the loss.
    """

    loss: float

    def begin(self) -> None:
        """Cut the batch.

        Raises:
            UsageError: it is missing, or cannot be cut.
        """

    def perform(self, action: Action, mail: Mail) -> None:
        """Do what an action stands for, on one of this rank's stages."""


class Training:
    """Forward and backward: gradients are added to the parameters'.

    Keeps one pullback for each microbatch that a stage has seen forward and not yet backward,
    or, where the backward pass is split, the products that its WEIGHT action will compute.

    Args:
        plan: what this rank does.
        modules: its stages.
        inputs: the batch, where stage 0 is.
        targets: the batch's, where the last stage is.
        loss: see `Loss`.

    Attributes:
        loss: the sum of the losses so far, weighted; 0.0 where the last stage is not.
        peak_held: the most activations that were held at once, in stages × microbatches.
    """

    def __init__(
        self,
        plan: Plan,
        modules: Mapping[int, Module],
        inputs: Batch | None,
        targets: Batch | None,
        loss: Loss,
    ) -> None:
        self.loss = 0.0
        self.peak_held = 0
        self._plan = plan
        self._last = plan.stages - 1
        self._modules = modules
        self._batch, self._marks = inputs, targets
        self._inputs: list[Array] = []
        self._targets: list[Array] = []
        self._weights: list[float] = []
        self._score = loss
        self._pullbacks: dict[tuple[int, int], Pullback] = {}
        self._products: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self._loss_grads: dict[int, Array] = {}

    def begin(self) -> None:
        """Cut the batch, and weigh its parts."""
        if 0 in self._modules:
            self._inputs = cut(self._batch, self._plan.call.microbatches, "inputs")
        if self._last in self._modules:
            self._targets = cut(self._marks, self._plan.call.microbatches, "targets")
            self._weights = shares(self._targets)

    def perform(self, action: Action, mail: Mail) -> None:
        """Do what an action stands for, on one of this rank's stages."""
        match action.kind:
            case Kind.FORWARD:
                self._forward(action, mail)
            case Kind.BACKWARD:
                self._backward(action, mail)
            case Kind.WEIGHT:
                products = self._products.pop((action.stage, action.microbatch))
                products.reverse()
                while products:
                    products.pop()()  # and so its factors are freed

    def _forward(self, action: Action, mail: Mail) -> None:
        stage, microbatch = action.stage, action.microbatch
        x = self._inputs[microbatch] if stage == 0 else mail.take(action)
        y, self._pullbacks[stage, microbatch] = self._modules[stage].vjp(x)
        self.peak_held = max(self.peak_held, len(self._pullbacks) + len(self._products))
        if stage == self._last:
            self._loss_grads[microbatch] = self._weigh(y, microbatch)
        else:
            mail.give(action, y)

    def _weigh(self, y: Array, microbatch: int) -> Array:
        weight = self._weights[microbatch]
        if weight == 0.0:  # nothing to score: many a mean of nothing is not a number
            nothing: Array = namespace_of(y).zeros_like(y)
            return nothing
        loss, grad = self._score(y, self._targets[microbatch])
        self.loss += weight * loss
        return grad if weight == 1.0 else (grad * weight).astype(grad.dtype, copy=False)

    def _backward(self, action: Action, mail: Mail) -> None:
        stage, place = action.stage, (action.stage, action.microbatch)
        last = stage == self._last
        grad_y = self._loss_grads.pop(action.microbatch) if last else mail.take(action)
        pullback = self._pullbacks.pop(place)
        if self._plan.splits_backward:
            with deferring(self._modules[stage].parameters()) as self._products[place]:
                grad_x = pullback(grad_y)
        else:
            grad_x = pullback(grad_y)
        if stage == 0:
            return
        if grad_x is None:
            raise UsageError(
                f"stage {stage} has no gradient for its input, and stage {stage - 1} needs it. "
                "Only the first stage may take indices."
            )
        mail.give(action, grad_x)


class Evaluation:
    """Forward only, keeping nothing but the last stage's outputs.

    Args:
        plan: what this rank does.
        modules: its stages.
        inputs: the batch, where stage 0 is.

    Attributes:
        loss: 0.0, for nothing is scored.
        outputs: by microbatch, where the last stage is.
    """

    def __init__(self, plan: Plan, modules: Mapping[int, Module], inputs: Batch | None) -> None:
        self.loss = 0.0
        self.outputs: dict[int, Array] = {}
        self._plan = plan
        self._modules = modules
        self._batch = inputs
        self._inputs: list[Array] = []

    def begin(self) -> None:
        """Cut the batch."""
        if 0 in self._modules:
            self._inputs = cut(self._batch, self._plan.call.microbatches, "inputs")

    def perform(self, action: Action, mail: Mail) -> None:
        """Compute a stage's output."""
        stage, microbatch = action.stage, action.microbatch
        y = self._modules[stage](self._inputs[microbatch] if stage == 0 else mail.take(action))
        if stage == self._plan.stages - 1:
            self.outputs[microbatch] = y
        else:
            mail.give(action, y)
