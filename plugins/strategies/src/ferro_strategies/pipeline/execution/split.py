"""split_model: this rank's stages of a model that was built as one Sequential, and the ties between stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ferro import ProcessGroup, UsageError

from ...nn.containers import Sequential
from .ties import Tie


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSplit:
    """What a rank needs of a model to make a Pipeline.

    Attributes:
        stages: this rank's stages.
        ties: the parameters that several stages share, for `Pipeline(ties=…)`; the same on every rank.
    """

    stages: list[Sequential]
    ties: list[Tie]


def split_model(
    model: Sequential, group: ProcessGroup, *, stages_per_rank: int = 1, cuts: Sequence[int] | None = None
) -> ModelSplit:
    """Split a Sequential into stages, and return those of this rank.

        with ferro_strategies.deferred():               # no rank has the arrays of the whole model
            model = nn.Sequential(table, *blocks, nn.Unembedding(table))
        split = split_model(model, group)
        pipeline = Pipeline(split.stages, group, microbatches=8, ties=split.ties)

    Pipeline draws the arrays of a deferred model for its own stages only; so do DDP and FSDP, if they wrap a stage.
    Stage s is on rank s % ranks, as in the schedules by name.

    Args:
        model: the whole model, the same on every rank; do not use it afterwards.
        group: the ranks of the pipeline.
        stages_per_rank: number of stages on each rank.
        cuts: for each stage but the first, the index of its first layer; None for equally many layers, as by
            `numpy.array_split`.

    Raises:
        UsageError: there are fewer layers than stages, or `cuts` does not fit.
    """
    if not isinstance(model, Sequential):
        raise UsageError(f"split_model: the model is a {type(model).__name__}, and must be a Sequential of its layers.")
    layers, count = list(model), group.world_size * stages_per_rank
    if stages_per_rank < 1 or len(layers) < count:
        raise UsageError(
            f"split_model: {len(layers)} layers cannot be split into {count} stages, {stages_per_rank} on each of "
            f"{group.world_size} ranks. Give each stage one layer or more."
        )
    starts = _even_cuts(len(layers), count) if cuts is None else [int(cut) for cut in cuts]
    bounds = [0, *starts, len(layers)]
    if len(starts) != count - 1 or any(one >= other for one, other in pairwise(bounds)):
        raise UsageError(
            f"split_model: cuts={list(starts)} must be {count - 1} increasing numbers from 1 to {len(layers) - 1}, the "
            "first layers of all stages but the first."
        )
    stages = [model[start:end] for start, end in pairwise(bounds)]
    for stage, start in zip(stages, bounds, strict=False):
        stage.first_layer = start
    return ModelSplit(stages=stages[group.rank :: group.world_size], ties=_shared_parameters(stages))


def _even_cuts(layers: int, stages: int) -> list[int]:
    size, longer = divmod(layers, stages)
    return [stage * size + min(stage, longer) for stage in range(1, stages)]


def _shared_parameters(stages: Sequence[Sequential]) -> list[Tie]:
    """List the parameters of which several stages have the same object, in definition order."""
    places: dict[int, dict[int, str]] = {}
    for number, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            places.setdefault(id(parameter), {})[number] = name
    return [tie for tie in places.values() if len(tie) > 1]
