"""Passes: the computation of each action on a rank, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

from ferro import UsageError

from ...nn.arrays import Array, namespace_of
from ...nn.checks import check_gradient
from ...nn.deferral import deferring
from ...nn.module import Module, Pullback
from ..schedules.schedule import Action, Kind
from .microbatches import Batch, loss_weights, split_batch
from .plan import PassPlan
from .point_to_point import PointToPoint

# Takes the last stage's output and the targets of a microbatch; returns the loss, a mean over the
# targets' elements, and its gradient with respect to the output.
Loss: TypeAlias = Callable[[Array, Array], tuple[float, Array]]


class PipelinePass(Protocol):
    """One pass of a batch through the pipeline.

    Attributes:
        loss: this rank's part of the loss.
    """

    loss: float

    def begin(self) -> None:
        """Split the batch.

        Raises:
            UsageError: the batch is missing, or cannot be split.
        """

    def perform(self, action: Action, transfers: PointToPoint) -> None:
        """Compute an action, on one of this rank's stages."""


class TrainingPass:
    """Forward and backward: gradients are added to the parameters' gradients.

    Between a microbatch's forward and backward action on a stage, the pass keeps the pullback; between BACKWARD and
    WEIGHT action, it keeps the deferred products.

    Args:
        plan: this rank's actions and transfers.
        modules: this rank's stages.
        inputs: the batch, on the rank of stage 0.
        targets: the batch's targets, on the rank of the last stage.
        loss: the loss function; see `Loss`.

    Attributes:
        loss: the weighted sum of the losses so far; 0.0 on ranks without the last stage.
        peak_activations: the largest number of activations held at once; one microbatch in one stage counts as one.
    """

    def __init__(
        self, plan: PassPlan, modules: Mapping[int, Module], inputs: Batch | None, targets: Batch | None, loss: Loss
    ) -> None:
        self.loss = 0.0
        self.peak_activations = 0
        self._plan = plan
        self._last = plan.stages - 1
        self._modules = modules
        self._input_batch, self._target_batch = inputs, targets
        self._inputs: list[Array] = []
        self._targets: list[Array] = []
        self._weights: list[float] = []
        self._loss_function = loss
        self._pullbacks: dict[tuple[int, int], Pullback] = {}
        self._products: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self._loss_grads: dict[int, Array] = {}

    def begin(self) -> None:
        """Split the batch, and compute the weight of each part."""
        if 0 in self._modules:
            self._inputs = split_batch(self._input_batch, self._plan.call.microbatches, "inputs")
        if self._last in self._modules:
            self._targets = split_batch(self._target_batch, self._plan.call.microbatches, "targets")
            self._weights = loss_weights(self._targets)

    def perform(self, action: Action, transfers: PointToPoint) -> None:
        """Compute an action, on one of this rank's stages."""
        match action.kind:
            case Kind.FORWARD:
                self._forward(action, transfers)
            case Kind.BACKWARD:
                self._backward(action, transfers)
            case Kind.WEIGHT:
                products = self._products.pop((action.stage, action.microbatch))
                products.reverse()
                while products:
                    products.pop()()  # popping frees its factors at once

    def _forward(self, action: Action, transfers: PointToPoint) -> None:
        stage, microbatch = action.stage, action.microbatch
        x = self._inputs[microbatch] if stage == 0 else transfers.recv(action)
        y, self._pullbacks[stage, microbatch] = self._modules[stage].vjp(x)
        self.peak_activations = max(self.peak_activations, len(self._pullbacks) + len(self._products))
        if stage == self._last:
            self._loss_grads[microbatch] = self._loss_grad(y, microbatch)
        else:
            transfers.send(action, y)

    def _loss_grad(self, y: Array, microbatch: int) -> Array:
        weight = self._weights[microbatch]
        if weight == 0.0:  # no targets: the mean over no elements may be nan
            zeros: Array = namespace_of(y).zeros_like(y)
            return zeros
        result = self._loss_function(y, self._targets[microbatch])
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise UsageError(
                f"the loss function must return (loss, grad), as nn.cross_entropy does; it returned a "
                f"{type(result).__name__}."
            )
        loss, grad = result
        check_gradient("the loss function", grad, y.shape)
        self.loss += weight * loss
        return grad if weight == 1.0 else (grad * weight).astype(grad.dtype, copy=False)

    def _backward(self, action: Action, transfers: PointToPoint) -> None:
        stage, key = action.stage, (action.stage, action.microbatch)
        is_last = stage == self._last
        grad_y = self._loss_grads.pop(action.microbatch) if is_last else transfers.recv(action)
        pullback = self._pullbacks.pop(key)
        if self._plan.splits_backward:
            with deferring(self._modules[stage].parameters()) as self._products[key]:
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
        transfers.send(action, grad_x)


class EvaluationPass:
    """Forward only: nothing is kept but the last stage's outputs.

    Args:
        plan: this rank's actions and transfers.
        modules: this rank's stages.
        inputs: the batch, on the rank of stage 0.

    Attributes:
        loss: 0.0, as there is no loss function.
        outputs: the outputs by microbatch, on the rank of the last stage.
    """

    def __init__(self, plan: PassPlan, modules: Mapping[int, Module], inputs: Batch | None) -> None:
        self.loss = 0.0
        self.outputs: dict[int, Array] = {}
        self._plan = plan
        self._modules = modules
        self._batch = inputs
        self._inputs: list[Array] = []

    def begin(self) -> None:
        """Split the batch."""
        if 0 in self._modules:
            self._inputs = split_batch(self._batch, self._plan.call.microbatches, "inputs")

    def perform(self, action: Action, transfers: PointToPoint) -> None:
        """Compute a stage's output."""
        stage, microbatch = action.stage, action.microbatch
        y = self._modules[stage](self._inputs[microbatch] if stage == 0 else transfers.recv(action))
        if stage == self._plan.stages - 1:
            self.outputs[microbatch] = y
        else:
            transfers.send(action, y)
