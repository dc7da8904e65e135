"""Passes: the computation of each action on a rank, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from ...nn.deferral import deferring
from ...nn.module import Module, Pullback
from ...nn.trees import Arrays, has_gradient, shapes_of
from ..schedules.schedule import Action, Kind
from .loss import Loss, LossOfMicrobatches, LossTotals
from .microbatches import Batch, join_microbatches, split_batch
from .plan import PassPlan
from .point_to_point import PointToPoint
from .stage_checks import InputOfStage, StageChecks


class PipelinePass(Protocol):
    """One pass of a batch through the pipeline."""

    @property
    def totals(self) -> LossTotals:
        """This rank's part of the loss."""

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
        returned_weight: whether the loss function returned weights in the last step.
        keep_outputs: whether to keep the outputs of the last stage.
        prepare: called on all ranks before anything else.

    Attributes:
        peak_activations: the largest number of activations held at once; one microbatch in one stage counts as one.
    """

    def __init__(
        self,
        plan: PassPlan,
        modules: Mapping[int, Module],
        inputs: Batch | None,
        targets: Batch | None,
        loss: Loss,
        *,
        returned_weight: bool = False,
        keep_outputs: bool = False,
        prepare: Callable[[], None],
    ) -> None:
        self.peak_activations = 0
        self._plan = plan
        self._last = plan.stages - 1
        self._modules = modules
        self._checks = {number: StageChecks(number, module) for number, module in modules.items()}
        self._input_batch, self._target_batch = inputs, targets
        self._inputs: list[Arrays] = []
        self._loss_function, self._returned_weight = loss, returned_weight
        self._prepare = prepare
        self._loss: LossOfMicrobatches | None = None
        self._outputs: dict[int, Arrays] | None = {} if keep_outputs else None
        # For each microbatch in a stage: the pullback, and what is known of the input.
        self._pullbacks: dict[tuple[int, int], tuple[Pullback, InputOfStage]] = {}
        self._products: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self._loss_grads: dict[int, Arrays] = {}

    @property
    def totals(self) -> LossTotals:
        """This rank's part of the loss: zeros on ranks without the last stage."""
        return LossTotals() if self._loss is None else self._loss.totals

    @property
    def outputs(self) -> Arrays:
        """The outputs of all microbatches together, where the last stage is and they were kept; else None."""
        return _joined(self._outputs or {})

    def begin(self) -> None:
        """Call `prepare`, and split the batch."""
        self._prepare()
        if 0 in self._modules:
            self._inputs = split_batch(self._input_batch, self._plan.call.microbatches, "inputs")
        if self._last in self._modules:
            targets = split_batch(self._target_batch, self._plan.call.microbatches, "targets")
            self._loss = LossOfMicrobatches(self._loss_function, targets, returned_weight=self._returned_weight)

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
        y, pullback = self._modules[stage].vjp(x)
        self._pullbacks[stage, microbatch] = pullback, InputOfStage(x, shapes_of(x))
        self.peak_activations = max(self.peak_activations, len(self._pullbacks) + len(self._products))
        self._checks[stage].output(y, microbatch)
        if stage != self._last:
            transfers.send(action, y)
            return
        assert self._loss is not None, "the rank of the last stage has the targets"
        self._loss_grads[microbatch] = self._loss(y, microbatch)
        if self._outputs is not None:
            self._outputs[microbatch] = y

    def _backward(self, action: Action, transfers: PointToPoint) -> None:
        stage, key = action.stage, (action.stage, action.microbatch)
        is_last = stage == self._last
        grad_y = self._loss_grads.pop(action.microbatch) if is_last else transfers.recv(action)
        pullback, x = self._pullbacks.pop(key)
        if self._plan.splits_backward:
            self._products[key] = []
        if not has_gradient(grad_y):  # the next stage's input has no floating-point numbers
            grad_x = None
        elif self._plan.splits_backward:
            with deferring(self._modules[stage].parameters()) as self._products[key]:
                grad_x = pullback(grad_y)
        else:
            grad_x = pullback(grad_y)
        if stage > 0:
            if has_gradient(grad_y):
                grad_x = self._checks[stage].input_gradient(grad_x, x, action.microbatch)
            transfers.send(action, grad_x)


class EvaluationPass:
    """Forward only: nothing is kept but the last stage's outputs.

    Args:
        plan: this rank's actions and transfers.
        modules: this rank's stages.
        inputs: the batch, on the rank of stage 0.

    Attributes:
        totals: zeros, as there is no loss function.
    """

    def __init__(self, plan: PassPlan, modules: Mapping[int, Module], inputs: Batch | None) -> None:
        self.totals = LossTotals()
        self._outputs: dict[int, Arrays] = {}
        self._plan = plan
        self._modules = modules
        self._checks = {number: StageChecks(number, module) for number, module in modules.items()}
        self._batch = inputs
        self._inputs: list[Arrays] = []

    @property
    def outputs(self) -> Arrays:
        """The outputs of all microbatches together, where the last stage is; None elsewhere."""
        return _joined(self._outputs)

    def begin(self) -> None:
        """Split the batch."""
        if 0 in self._modules:
            self._inputs = split_batch(self._batch, self._plan.call.microbatches, "inputs")

    def perform(self, action: Action, transfers: PointToPoint) -> None:
        """Compute a stage's output."""
        stage, microbatch = action.stage, action.microbatch
        y = self._modules[stage](self._inputs[microbatch] if stage == 0 else transfers.recv(action))
        self._checks[stage].output(y, microbatch)
        if stage == self._plan.stages - 1:
            self._outputs[microbatch] = y
        else:
            transfers.send(action, y)


def _joined(outputs: Mapping[int, Arrays]) -> Arrays:
    return join_microbatches([outputs[number] for number in sorted(outputs)])
