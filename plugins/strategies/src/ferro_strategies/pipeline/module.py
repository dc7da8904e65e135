"""Pipeline: a model whose layers are spread over ranks, trained microbatch by microbatch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array, namespace_of
from ..nn.module import Module, Pullback
from ..optim.clip import check_max_norm, scale_grads, squared_norm
from .call import FORWARD, STEP
from .joint import joint_schedule, named
from .mail import lines
from .microbatches import Batch
from .passes import Evaluation, Loss, Training
from .routes import forward_only, plan_of
from .runner import Runner
from .schedule import PipelineSchedule
from .synchronised import Synchronised
from .ties import Tie, Ties


class Pipeline(Module):
    """This rank's stages of a model, which together with the other ranks' are trained as one.

    pipeline = Pipeline([stage], group, microbatches=8)
    optimizer = SGD(pipeline.parameters(), lr=0.1)
    for x, labels in batches:
        loss = pipeline.step(x, labels, cross_entropy)
        optimizer.step(); optimizer.zero_grad()

    Loss and gradients are those of the whole batch in one process, where every row is computed
    by itself: a layer that looks at the whole batch, as BatchNorm does, sees one microbatch.

    As a module it has the parameters, buffers and state of this rank's stages. Names begin with
    the stage's number in the whole model, "3.layers.0.weight", so the ranks' states put together
    are the whole model's.

    A stage, or a part of it, may be wrapped in DDP or FSDP over ranks that hold the same stage:
    its gradients are reduced once a step. Wrap stages, not the pipeline.

    Args:
        stages: this rank's, first to last. Stage s is on rank s % ranks, unless a
            PipelineSchedule says otherwise.
        group: the ranks that hold one copy of the model.
        schedule: a name (see `build`), or a schedule; checked before anything moves.
        microbatches: how many parts a batch is cut into.
        ties: parameters that stages share. For each a dict from stage to the name there,
            [{0: "weight", 3: "0.weight"}]. Each stage keeps a copy; the first one's value is
            given to the others now, and in each step their gradients are added up. In a model of
            one stage, where a tie can name no other, it does nothing.

    Attributes:
        schedule: by which a step goes.
        peak_activations: how many microbatches this rank's stages held at most in the last
            step, summed over its stages.
        busy_s: how long this rank's stages, and the loss, computed in the last step, in seconds;
            arrays on a GPU are computed later than that. What is left of the time that the step
            took is the rank's bubble.

    Raises:
        UsageError: stages, schedule or ties do not fit, or ranks differ; on every rank, and
            nothing was changed.
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
        self.schedule = joint_schedule(stages, group, schedule, microbatches, ties)
        self.peak_activations = 0
        self.busy_s = 0.0
        self._group = group
        self._plan = plan_of(self.schedule, group.rank, STEP)
        self._numbers = self.schedule.stages_of(group.rank)
        for number, stage in zip(self._numbers, stages, strict=True):
            setattr(self, str(number), stage)  # so that names begin with the number
        for name, parameter in self.named_parameters():
            parameter.name = name
        self._runner = Runner(group, lines(self.schedule, group))
        tied = {number: named(stage) for number, stage in self._stages().items()}
        self._ties = Ties(group, self.schedule.rank_of, tied, ties)
        self._ties.share_values()
        self._wrapped = tuple(
            module
            for stage in stages
            for module in stage.modules()
            if isinstance(module, Synchronised)
        )
        # Whether any rank does something after the backward pass, so that all ask how it went.
        settles = np.array(bool(self._wrapped or ties), np.uint8)
        self._settles = bool(group.all_reduce(settles, "max"))

    def step(self, inputs: Batch | None, targets: Batch | None, loss: Loss) -> float:
        """Take a batch forward and backward; add to the parameters' gradients. All ranks call it.

        Args:
            inputs: where stage 0 is; ignored elsewhere. (rows, …), cut into microbatches along
                axis 0 as by `numpy.array_split`, or a sequence of microbatches of any shapes.
            targets: where the last stage is; ignored elsewhere. Likewise.
            loss: called with an output of the last stage and its targets, returns the mean over
                the targets' elements and its gradient, as `nn.cross_entropy` does.

        Returns:
            The mean over all targets, on every rank.

        Raises:
            Exception: what one of this rank's stages, or the loss, raised; a note says where.
            FerroError: another rank failed, or the group.
            UsageError: an earlier pass failed.
        """
        self._ties.begin()
        work = Training(self._plan, self._stages(), inputs, targets, loss)
        with ExitStack() as stack:
            for wrapped in self._wrapped:
                stack.enter_context(wrapped.no_sync())
            total = self._runner.run(self._plan, work)
        self.peak_activations = work.peak_held
        self.busy_s = self._runner.busy_s
        if self._settles:
            self._runner.settle(STEP, self._settle)
        return total

    def forward(self, inputs: Batch | None, *, microbatches: int = 1) -> Array | None:
        """Compute the outputs alone, as `module(x)` does. All ranks call it.

        Args:
            inputs: see `step`.
            microbatches: into how many parts to cut them, or how many they are, the same on every
                rank: with one per stage, all ranks have something to do.

        Returns:
            The last stage's outputs, all rows together, where that stage is; None elsewhere.

        Raises:
            UsageError: `microbatches` is not positive. And as `step`.
        """
        if microbatches < 1:
            raise UsageError(f"Pipeline.forward: microbatches is {microbatches}; at least 1.")
        schedule = forward_only(self.schedule, microbatches)
        plan = plan_of(schedule, self._group.rank, FORWARD)
        work = Evaluation(plan, self._stages(), inputs)
        self._runner.run(plan, work)
        parts = [work.outputs[number] for number in sorted(work.outputs)]
        if len(parts) < 2:
            return parts[0] if parts else None
        whole: Array = namespace_of(parts[0]).concatenate(parts)
        return whole

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale all stages' gradients so that together they are no longer than `max_norm`.

        As `optim.clip_grad_norm`, for the whole model: tied copies count once, and parameters
        that a strategy has split count with all their pieces. All ranks call it after `step`.
        Do not give this rank's parameters to `optim.clip_grad_norm` instead: it sees no other
        rank's, so that each stage would be scaled by another norm.

        Returns:
            The norm before, the same on all ranks.

        Raises:
            UsageError: `max_norm` is not positive.
        """
        check_max_norm(max_norm)
        mine = squared_norm(self._ties.once(self.parameters()))
        norm = math.sqrt(float(self._group.all_reduce(np.float64(mine))))
        scale_grads(self.parameters(), max_norm, norm)
        return norm

    def zero_grad(self) -> None:
        """Mark every gradient absent, as each stage's own does it."""
        for stage in self._stages().values():
            stage.zero_grad()

    def state_dict(self) -> dict[str, Array]:
        """Copy the parameters and buffers of this rank's stages, as each stage's own does it."""
        return {
            f"{number}.{name}": array
            for number, stage in self._stages().items()
            for name, array in stage.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Copy arrays into this rank's stages; those of other ranks' stages are left aside.

        Raises:
            UsageError: names, shapes or dtypes do not fit. Nothing was loaded into the stage
                concerned and those after it.
        """
        parts: dict[int, dict[str, Array]] = {number: {} for number in range(self.schedule.stages)}
        for key, array in state.items():
            number, _, name = key.partition(".")
            if not number.isdecimal() or int(number) not in parts:
                raise UsageError(
                    f"load_state_dict: {key!r} does not begin with the number of a stage, 0 to "
                    f"{self.schedule.stages - 1}. Nothing was loaded."
                )
            parts[int(number)][name] = array
        for stage, module in self._stages().items():
            module.load_state_dict(parts[stage])

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

    def _settle(self) -> None:
        for wrapped in self._wrapped:
            wrapped.sync_gradients()
        self._ties.sum_gradients()
