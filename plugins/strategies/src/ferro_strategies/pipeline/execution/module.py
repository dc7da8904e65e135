"""Pipeline: a model whose layers are spread over ranks, trained microbatch by microbatch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol, runtime_checkable

import numpy as np

from ferro import ProcessGroup, UsageError

from ...nn.arrays import Array, namespace_of
from ...nn.module import Module, Pullback
from ...nn.state import StateLoad
from ...optim.clip import check_max_norm, scale_grads, squared_norm
from ..schedules.build import forward_only
from ..schedules.schedule import PipelineSchedule
from .microbatches import Batch
from .passes import EvaluationPass, Loss, TrainingPass
from .plan import FORWARD, STEP, make_plan
from .point_to_point import open_channels
from .runner import PassRunner
from .ties import ParameterTies, Tie
from .validation import parameters_by_name, validated_schedule


@runtime_checkable
class DataParallelModule(Protocol):
    """The methods of DDP and FSDP that reduce the gradients of several passes at once."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients, without reducing them."""

    def sync_gradients(self) -> None:
        """Reduce the accumulated gradients."""


class Pipeline(Module):
    """This rank's stages of a model, which is trained as one together with the other ranks' stages.

    pipeline = Pipeline([stage], group, microbatches=8)
    optimizer = SGD(pipeline.parameters(), lr=0.1)
    for x, labels in batches:
        loss = pipeline.step(x, labels, cross_entropy)
        optimizer.step(); optimizer.zero_grad()

    Loss and gradients are those of the whole batch in one process, where every row is computed
    by itself: a layer that looks at the whole batch, as BatchNorm does, sees one microbatch.

    As a module it has the parameters, buffers and state of this rank's stages. Names begin with the stage's number in
    the whole model, "3.layers.0.weight", so the union of the ranks' state dicts is the whole model's state dict.

    A stage, or a part of it, may be wrapped in DDP or FSDP over ranks that hold the same stage:
    its gradients are reduced once a step. Wrap stages, not the pipeline.

    Args:
        stages: this rank's stages, first to last. Stage s is on rank s % ranks, unless a
            PipelineSchedule says otherwise.
        group: the ranks that hold one copy of the model.
        schedule: a name (see `build`), or a schedule; checked before anything moves.
        microbatches: the number of parts into which a batch is split.
        ties: parameters that stages share, each as a dict from stage to the name in it, [{0: "weight", 3: "0.weight"}].
            Each stage keeps a copy; the first copy's value is broadcast to the others now, and in each step their
            gradients are added up. A tie that names only one stage does nothing.

    Attributes:
        schedule: the order of a step's actions.
        peak_activations: the most microbatches that this rank's stages held in the last step,
            summed over its stages.
        busy_s: the time that this rank's stages, and the loss, computed in the last step, in
            seconds; arrays on a GPU are computed later than that. The rest of the step's time is
            the rank's bubble.

    Raises:
        UsageError: stages, schedule or ties do not fit, or ranks differ. It is raised on every
            rank, and nothing was changed.
    """

    def __init__(
        self,
        stages: Sequence[Module],
        group: ProcessGroup,
        *,
        schedule: str | PipelineSchedule = "1f1b",
        microbatches: int,
        ties: Sequence[Tie] = (),
    ) -> None:
        self.schedule = validated_schedule(stages, group, schedule, microbatches, ties)
        self.peak_activations = 0
        self.busy_s = 0.0
        self._group = group
        self._plan = make_plan(self.schedule, group.rank, STEP)
        self._numbers = self.schedule.stages_of(group.rank)
        for number, stage in zip(self._numbers, stages, strict=True):
            setattr(self, str(number), stage)  # names of parameters begin with the number
        for name, parameter in self.named_parameters():
            parameter.name = name
        self._runner = PassRunner(group, open_channels(self.schedule, group))
        parameters = {number: parameters_by_name(stage) for number, stage in self._stages().items()}
        self._ties = ParameterTies(group, self.schedule.rank_of, parameters, ties)
        self._ties.share_values()
        self._data_parallel = tuple(
            module for stage in stages for module in stage.modules() if isinstance(module, DataParallelModule)
        )
        # If any rank reduces gradients after the backward pass, all ranks agree on its success.
        reduces = np.array(bool(self._data_parallel or ties), np.uint8)
        self._any_rank_reduces = bool(group.all_reduce(reduces, "max"))

    def step(self, inputs: Batch | None, targets: Batch | None, loss: Loss) -> float:
        """Take a batch forward and backward; add to the parameters' gradients. All ranks call it.

        Args:
            inputs: used on the rank of stage 0, ignored elsewhere: an array (rows, …), split into
                microbatches along axis 0 as by `numpy.array_split`, or a sequence of microbatches
                of any shapes.
            targets: used on the rank of the last stage, ignored elsewhere; like `inputs`.
            loss: takes an output of the last stage and its targets, and returns the mean over the
                targets' elements and its gradient, as `nn.cross_entropy` does.

        Returns:
            The mean over all targets, on every rank.

        Raises:
            Exception: one of this rank's stages, or the loss, raised it; a note says where.
            FerroError: another rank, or the group, failed.
            UsageError: an earlier pass failed.
        """
        self._ties.clear_duplicate_gradients()
        work = TrainingPass(self._plan, self._stages(), inputs, targets, loss)
        with ExitStack() as stack:
            for module in self._data_parallel:
                stack.enter_context(module.no_sync())
            total = self._runner.run(self._plan, work)
        self.peak_activations = work.peak_activations
        self.busy_s = self._runner.busy_s
        if self._any_rank_reduces:
            self._runner.run_after(STEP, self._reduce_gradients)
        return total

    def forward(self, inputs: Batch | None, *, microbatches: int = 1) -> Array | None:
        """Compute the outputs alone, as `module(x)` does. All ranks call it.

        Args:
            inputs: see `step`.
            microbatches: the number of parts to split the inputs into, or the length of the
                sequence; equal on every rank. With one per stage, all ranks have work.

        Returns:
            The last stage's outputs, all rows together, where that stage is; None elsewhere.

        Raises:
            UsageError: `microbatches` is not positive, or an earlier pass failed.
            Exception: a stage, another rank or the group failed; see `step`.
        """
        if microbatches < 1:
            raise UsageError(f"Pipeline.forward: microbatches is {microbatches}; at least 1.")
        schedule = forward_only(self.schedule, microbatches)
        plan = make_plan(schedule, self._group.rank, FORWARD)
        work = EvaluationPass(plan, self._stages(), inputs)
        self._runner.run(plan, work)
        parts = [work.outputs[number] for number in sorted(work.outputs)]
        if len(parts) < 2:
            return parts[0] if parts else None
        whole: Array = namespace_of(parts[0]).concatenate(parts)
        return whole

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale all stages' gradients so that their global norm is at most `max_norm`.

        This is `optim.clip_grad_norm` for the whole model: the norm includes tied copies once, and all pieces of
        parameters that a strategy has split. All ranks call it after `step`. Do not use `optim.clip_grad_norm` instead:
        it would scale each rank's stages by the norm of these stages alone.

        Returns:
            The norm before, the same on all ranks.

        Raises:
            UsageError: `max_norm` is not positive.
        """
        check_max_norm(max_norm)
        own = squared_norm(self._ties.without_duplicates(self.parameters()))
        norm = math.sqrt(float(self._group.all_reduce(np.float64(own))))
        scale_grads(self.parameters(), max_norm, norm)
        return norm

    def zero_grad(self) -> None:
        """Call `zero_grad` of every stage."""
        for stage in self._stages().values():
            stage.zero_grad()

    def state_dict(self) -> dict[str, Array]:
        """Copy the parameters and buffers of this rank's stages, by `state_dict` of every stage."""
        return {
            f"{number}.{name}": array
            for number, stage in self._stages().items()
            for name, array in stage.state_dict().items()
        }

    def prepare_load_state_dict(self, state: Mapping[str, Array]) -> StateLoad:
        """Check a state and plan the loading of this rank's stages; arrays of other ranks' stages are ignored."""
        load = StateLoad()
        parts: dict[int, dict[str, Array]] = {number: {} for number in range(self.schedule.stages)}
        for key, array in state.items():
            number, _, name = key.partition(".")
            if not number.isdecimal() or int(number) not in parts:
                load.faults.append(
                    f"{key!r} does not begin with the number of a stage, 0 to {self.schedule.stages - 1}"
                )
            else:
                parts[int(number)][name] = array
        for stage, module in self._stages().items():
            load.add(f"{stage}.", module.prepare_load_state_dict(parts[stage]))
        return load

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Refuse: half of a pass would leave the other ranks waiting.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a Pipeline goes forward and backward in one: call step(inputs, targets, loss), or "
            "forward(inputs) for the outputs. To train replicas, wrap the stages, not the pipeline."
        )

    def __repr__(self) -> str:
        stages = ", ".join(f"{number}: {stage!r}" for number, stage in self._stages().items())
        return f"Pipeline({{{stages}}}, {self._group!r}, schedule={self.schedule.name!r})"

    def _stages(self) -> dict[int, Module]:
        return {number: getattr(self, str(number)) for number in self._numbers}

    def _reduce_gradients(self) -> None:
        for module in self._data_parallel:
            module.sync_gradients()
        self._ties.sum_gradients()
