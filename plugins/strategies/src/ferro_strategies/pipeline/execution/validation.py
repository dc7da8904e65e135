"""Validation of a pipeline: the arguments of all ranks must describe parts of the same pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from ferro import FerroError, ProcessGroup, UsageError

from ...nn.module import Module
from ...nn.parameter import Parameter
from ..schedules.build import build
from ..schedules.check import check
from ..schedules.schedule import PipelineSchedule
from .ties import Tie

# Describes a parameter that FSDP has cut.
_FLAT = ", a piece of a flat row"


def validated_schedule(
    modules: Sequence[Module],
    group: ProcessGroup,
    schedule: str | PipelineSchedule,
    microbatches: int,
    ties: Sequence[Tie],
) -> PipelineSchedule:
    """Check that schedule, stages and ties fit on all ranks; return the schedule.

    Raises:
        UsageError: a rank's arguments do not fit, or ranks differ. It is raised on every rank, and
            nothing was changed.
    """
    built: PipelineSchedule | None = None
    own_error: FerroError | None = None
    report: dict[str, object] = {}
    try:
        _check_list(modules)
        built = _schedule(schedule, group.world_size, len(modules), microbatches)
        numbers = built.stages_of(group.rank)
        _check_stages(modules, numbers)
        tied = _describe_ties(ties, dict(zip(numbers, modules, strict=True)), built.stages)
        stage_count = str(len(modules)) if isinstance(schedule, str) else "that of the schedule"
        report = {"facts": _facts(built, stage_count, ties), "tied": tied}
    except FerroError as error:
        own_error = error
    report["fault"] = "" if own_error is None else str(own_error)
    reports: list[dict[str, object]] = group.all_gather_object(report)
    if own_error is not None:
        raise own_error
    _check_faults(group, [str(other["fault"]) for other in reports])
    _check_equal(group, [other["facts"] for other in reports])  # type: ignore[misc]
    _check_tied_copies(group, [other["tied"] for other in reports])  # type: ignore[misc]
    assert built is not None
    return built


def parameters_by_name(module: Module) -> dict[str, Parameter]:
    """Return a stage's parameters by their names in the stage."""
    return dict(module.named_parameters())


def _schedule(schedule: str | PipelineSchedule, ranks: int, stages: int, microbatches: int) -> PipelineSchedule:
    if isinstance(schedule, str):
        if not stages:
            raise UsageError("Pipeline: the list of stages is empty. Give every rank one or more.")
        built = build(schedule, ranks=ranks, stages_per_rank=stages, microbatches=microbatches)
    else:
        built = schedule
        if built.microbatches != microbatches or built.ranks != ranks:
            raise UsageError(
                f"Pipeline: the schedule {built.name!r} is for {built.ranks} ranks and "
                f"{built.microbatches} microbatches, not for {ranks} and {microbatches}."
            )
    check(built)
    return built


def _check_list(stages: object) -> None:
    if isinstance(stages, Module) or not isinstance(stages, Sequence):
        raise UsageError(f"Pipeline: the stages are a {type(stages).__name__}, not a list. Pass [stage], or several.")


def _check_stages(modules: Sequence[Module], numbers: Sequence[int]) -> None:
    for module in modules:
        if not isinstance(module, Module):
            raise UsageError(f"Pipeline: a stage is a {type(module).__name__}, not a Module.")
    if len(modules) != len(numbers):
        raise UsageError(
            f"Pipeline: by the schedule this rank has the stages {list(numbers)}, and got {len(modules)} modules."
        )
    if len({id(module) for module in modules}) != len(modules):
        raise UsageError(
            "Pipeline: one module is given for two stages. Give each its own, and say in `ties` "
            "which parameters are shared."
        )


def _describe_ties(ties: Sequence[Tie], modules: Mapping[int, Module], stages: int) -> list[list[str]]:
    """Check the ties against this rank's stages; describe its copies of each."""
    found: list[list[str]] = []
    seen: set[tuple[int, str]] = set()
    for tie in ties:
        # In a model of one stage, {0: …, stages - 1: …} names only one stage: then nothing is tied.
        if len(tie) < min(2, stages) or not all(0 <= stage < stages for stage in tie):
            raise UsageError(f"Pipeline: the tie {dict(tie)} must name two stages or more, of 0 to {stages - 1}.")
        for stage, name in tie.items():
            if (stage, name) in seen:
                raise UsageError(f"Pipeline: {name!r} of stage {stage} is in two ties. Put all copies in one.")
            seen.add((stage, name))
        found.append([])
        for stage in sorted(set(tie) & set(modules)):
            parameter = parameters_by_name(modules[stage]).get(tie[stage])
            if parameter is None:
                raise UsageError(
                    f"Pipeline: stage {stage} has no parameter {tie[stage]!r}, which a tie names; "
                    f"it has {', '.join(parameters_by_name(modules[stage])) or 'none'}."
                )
            found[-1].append(_describe(parameter))
    return found


def _describe(parameter: Parameter) -> str:
    """Describe all that must be equal in tied copies."""
    splits = "".join(
        f"{_FLAT} from {split.start}" if split.dim is None else f", split along {split.dim}"
        for split in parameter.splits
    )
    return f"{parameter.dtype} {parameter.shape}{splits}{'' if parameter.requires_grad else ', frozen'}"


def _facts(schedule: PipelineSchedule, stage_count: str, ties: Sequence[Tie]) -> dict[str, str]:
    """Return the values that must be equal on every rank, by name.

    Args:
        schedule: the rank's schedule.
        stage_count: number of the rank's stages, where all ranks must have as many.
        ties: the ties that the rank was given.
    """
    actions = repr((schedule.actions, schedule.splits_backward)).encode()
    return {
        "schedule": schedule.name,
        "microbatches": str(schedule.microbatches),
        "number of stages": stage_count,
        "ranks of the stages": str(list(schedule.rank_of)),
        "ties": str([sorted(tie.items()) for tie in ties]),
        "actions (digest)": hashlib.sha256(actions).hexdigest()[:16],
    }


def _check_faults(group: ProcessGroup, faults: Sequence[str]) -> None:
    for rank, fault in enumerate(faults):
        if fault:
            raise _error(group, rank, f"rank {rank} cannot take part: {fault.rstrip('.')}.")


def _check_equal(group: ProcessGroup, reports: Sequence[Mapping[str, str]]) -> None:
    for rank, facts in enumerate(reports):
        for name, value in facts.items():
            if value != reports[0][name]:
                raise _error(
                    group,
                    rank,
                    f"ranks differ in the {name}: rank 0 has {reports[0][name]}, rank {rank} "
                    f"has {value}. Give the same on every rank.",
                )


def _check_tied_copies(group: ProcessGroup, reports: Sequence[Sequence[Sequence[str]]]) -> None:
    first: dict[int, str] = {}
    for rank, tied in enumerate(reports):
        for index, copies in enumerate(tied):
            for copy in copies:
                if copy != first.setdefault(index, copy):
                    raise _error(
                        group,
                        rank,
                        f"the copies of tie {index} differ: one is {first[index]}, on rank {rank} one is {copy}."
                        + _remedy(copy, first[index]),
                    )


def _remedy(*copies: str) -> str:
    """Say how pieces of tied copies are made alike, if there are any."""
    if not any(_FLAT in copy for copy in copies):
        return ""
    return (
        " FSDP cuts the parameters of a unit as one row, so copies in units with other parameters are cut elsewhere. "
        "Shard all stages of a tie alike, and make the layers that have the copies units of their own: "
        "FSDP(stage, group, units=lambda name, module: isinstance(module, nn.Embedding | nn.Unembedding))."
    )


def _error(group: ProcessGroup, peer: int, fault: str) -> UsageError:
    return UsageError(
        f"Pipeline on group {group.name!r}: {fault} Nothing was changed.", group=group.name, rank=group.rank, peer=peer
    )
