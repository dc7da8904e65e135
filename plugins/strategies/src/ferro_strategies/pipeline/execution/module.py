"""Pipeline: a model whose layers are spread over ranks, trained microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NoReturn, overload

import numpy as np

from ferro import ProcessGroup, UsageError

from ...nn.arrays import Array
from ...nn.checkpoint_piece import CheckpointPiece
from ...nn.module import Module, Pullback
from ...nn.parameter import Parameter
from ...nn.state import OptimizerWithState, StateLoad
from ...nn.trees import Arrays
from ...optim.clip import clip_grad_norm
from ...optim.state import FRESH
from ..schedules.build import forward_only
from ..schedules.schedule import PipelineSchedule
from .data_parallel import StageModules, total_over_replicas
from .loss import Loss, LossTotals
from .microbatches import Batch
from .passes import EvaluationPass, TrainingPass
from .plan import FORWARD, STEP, edges, make_plan
from .point_to_point import open_channels
from .runner import PassRunner
from .ties import ParameterTies, Tie
from .validation import parameters_by_name, validated_schedule
from .whole_names import WholeNames, own_first_layers


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
            PipelineSchedule says otherwise. `split_model` makes them of a whole model. The arrays of
            a deferred stage are drawn now.
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
        metrics: the means of the metrics that the loss function returned in the last step, on every rank.

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
        self.metrics: dict[str, float] = {}
        self._group = group
        self._plan = make_plan(self.schedule, group.rank, STEP)
        self._numbers = self.schedule.stages_of(group.rank)
        for number, stage in zip(self._numbers, stages, strict=True):
            setattr(self, str(number), stage.materialize())  # names of parameters begin with the number
        for name, parameter in self.named_parameters():
            parameter.name = name
        self._runner = PassRunner(group, edges(self.schedule), open_channels(self.schedule, group))
        parameters = {number: parameters_by_name(stage) for number, stage in self._stages().items()}
        self._ties = ParameterTies(group, self.schedule.rank_of, parameters, ties)
        self._ties.share_values()
        self._found = StageModules(stages)
        # If any rank reduces gradients after the backward pass, all ranks agree on its success.
        first_layers = own_first_layers(self._stages(), self.schedule.stages)
        everyones = group.all_gather(np.array([[bool(self._found.data_parallel), *first_layers]], np.int64))
        self._has_replicas = everyones[:, 0].astype(bool).tolist()
        self._whole_names = WholeNames(everyones[:, 1:].max(axis=0).tolist(), ties)
        self._loss_returns_weight = False
        for parameter in (*super().parameters(), self._found.placeholder):
            parameter.stages = group

    @overload
    def step(
        self, inputs: Batch | None, targets: Batch | None, loss: Loss, *, return_outputs: Literal[False] = False
    ) -> float: ...

    @overload
    def step(
        self, inputs: Batch | None, targets: Batch | None, loss: Loss, *, return_outputs: Literal[True]
    ) -> tuple[float, Arrays]: ...

    def step(
        self, inputs: Batch | None, targets: Batch | None, loss: Loss, *, return_outputs: bool = False
    ) -> float | tuple[float, Arrays]:
        """Take a batch forward and backward; add to the parameters' gradients. All ranks call it.

        Args:
            inputs: used on the rank of stage 0, ignored elsewhere: an array (rows, …), or a tuple or dict of such
                arrays, split into microbatches along axis 0 as by `numpy.array_split`, or a list of microbatches of
                any shapes.
            targets: used on the rank of the last stage, ignored elsewhere; like `inputs`.
            loss: takes an output of the last stage and its targets, and returns a mean and its gradient, as
                `nn.cross_entropy` does: (loss, grad), or (loss, grad, weight) if the mean is over `weight` items, such
                as the tokens that are not padding. Without weight it is over the targets' elements (of a tree, those
                of the first array). A dict of numbers may follow, which become `metrics`.
            return_outputs: whether to return the outputs, too.

        Returns:
            The mean over the whole batch, on every rank. If the loss function returns weights, it is the mean over the
            batches of all replicas of the stages, and so are the gradients. With `return_outputs`, (loss, outputs):
            outputs are those of the last stage, all rows together, where that stage is, and None elsewhere.

        Raises:
            Exception: one of this rank's stages, or the loss, raised it; a note says where.
            FerroError: another rank, or the group, failed.
            UsageError: an earlier pass failed.
        """
        self._ties.clear_duplicate_gradients()
        self._found.refresh()
        before = self._found.copy_gradients()
        work = TrainingPass(
            self._plan,
            self._stages(),
            inputs,
            targets,
            loss,
            returned_weight=self._loss_returns_weight,
            keep_outputs=return_outputs,
            prepare=self._found.sync_buffers,
        )
        with self._found.accumulating():
            row = self._runner.run(self._plan, work)
        self.peak_activations = work.peak_activations
        self.busy_s = self._runner.busy_s
        totals, has_metrics = LossTotals.from_array(row)
        if has_metrics:
            totals.metrics = self._group.broadcast_object(work.totals.metrics, self.schedule.rank_of[-1])
        self._loss_returns_weight = totals.reference > 0

        def finish() -> None:
            nonlocal totals
            if self._loss_returns_weight:
                totals, factor = total_over_replicas(
                    totals, self._group, self._found.averaging_groups, self._has_replicas
                )
                self._found.scale_gradients(factor, before)
            self._found.sync_gradients()
            self._ties.sum_gradients()

        if any(self._has_replicas) or self._ties.exist:
            self._runner.run_after(STEP, finish)
        else:
            finish()
        self.metrics = totals.mean_metrics
        return (totals.mean, work.outputs) if return_outputs else totals.mean

    def forward(self, inputs: Batch | None, *, microbatches: int = 1) -> Arrays:
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
        return work.outputs

    def clip_grad_norm(self, max_norm: float, norm_type: float = 2.0) -> float:
        """Scale all stages' gradients so that their global norm is at most `max_norm`.

        It is `optim.clip_grad_norm(pipeline.parameters(), …)`: the norm includes the other ranks' stages, tied copies
        once, and all pieces of parameters that a strategy has split. All ranks call it after `step`.

        Args:
            max_norm: largest norm allowed.
            norm_type: 2 for the Euclidean norm, any other positive number, or infinity; see `optim.grad_norm`.

        Returns:
            The norm before, the same on all ranks.

        Raises:
            UsageError: `max_norm` or `norm_type` is not positive.
        """
        return clip_grad_norm(self.parameters(), max_norm, norm_type)

    def parameters(self) -> Iterator[Parameter]:
        """Yield every parameter of this rank's stages once, in definition order.

        If none of them is trained, an empty parameter follows. By it an optimizer, `optim.clip_grad_norm` and
        LossScaler of this rank know the pipeline, whose other ranks wait for their part in common decisions.
        """
        trained = False
        for parameter in super().parameters():
            trained = trained or parameter.requires_grad
            yield parameter
        if not trained:
            yield self._found.placeholder

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
        """Check a state and plan the loading of this rank's stages; arrays of other ranks' stages are ignored.

        If one rank's arrays do not fit, no rank of the pipeline loads.
        """
        load = StateLoad(groups=[self._group])
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

    def load_full_optimizer_state_dict(self, optimizer: OptimizerWithState, state: Mapping[str, Array]) -> None:
        """Load the state of an optimizer of this rank's stages; state of other ranks' stages is ignored.

        Raises:
            UsageError: see `Module.load_full_optimizer_state_dict`.
        """
        others = {str(number) for number in range(self.schedule.stages)} - {str(number) for number in self._numbers}
        own = {name: array for name, array in state.items() if name.partition(".")[0] not in others}
        super().load_full_optimizer_state_dict(optimizer, own)

    def prepare_load_optimizer_state(self, optimizer: OptimizerWithState, state: Mapping[str, Array]) -> StateLoad:
        """Check a state of an optimizer; if one rank's arrays do not fit, no rank of the pipeline loads."""
        load = super().prepare_load_optimizer_state(optimizer, state)
        load.add_groups([self._group])
        for index, parameter in enumerate(optimizer.parameters):
            if parameter is self._found.placeholder:
                load.states[index] = parameter.name, {FRESH: np.array(True)}
        return load

    def checkpoint_arrays(self) -> Mapping[str, CheckpointPiece]:
        """Describe the pieces of this rank's stages, by the names that they have in the whole model, see `WholeNames`.

        The whole model is the Sequential that `split_model` has split, or else `Sequential(*stages)`. Of several copies
        of a tied parameter on this rank, the first stage's is there.
        """
        pieces: dict[str, CheckpointPiece] = {}
        for name, piece in super().checkpoint_arrays().items():
            pieces.setdefault(self._whole_name(name), replace(piece, on_all_ranks=False))
        return pieces

    def checkpoint_parameters(self) -> Mapping[str, Parameter]:
        """List the parameters of this rank's stages by the names of `checkpoint_arrays`."""
        found: dict[str, Parameter] = {}
        for name, item in super().checkpoint_parameters().items():
            found.setdefault(self._whole_name(name), item)
        return found

    def finish_checkpoint_load(self) -> None:
        """Give further copies of tied parameters on this rank what was loaded into the first."""
        super().finish_checkpoint_load()
        self._ties.follow_loaded()

    def _whole_name(self, name: str) -> str:
        return self._whole_names.of(name)

    def vjp(self, x: Arrays) -> tuple[Arrays, Pullback]:
        """Refuse: half of a pass would leave the other ranks waiting.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a Pipeline goes forward and backward in one: call step(inputs, targets, loss), or "
            "forward(inputs) for the outputs. To train replicas, wrap the stages, not the pipeline."
        )

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        """Refuse, because the ranks' channels cannot be copied.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a Pipeline cannot be copied, because it has connections to the other ranks' stages. Copy the stages "
            "before you make the pipeline, or copy its state_dict()."
        )

    def __repr__(self) -> str:
        stages = ", ".join(f"{number}: {stage!r}" for number, stage in self._stages().items())
        return f"Pipeline({{{stages}}}, {self._group!r}, schedule={self.schedule.name!r})"

    def _stages(self) -> dict[int, Module]:
        return {number: getattr(self, str(number)) for number in self._numbers}
