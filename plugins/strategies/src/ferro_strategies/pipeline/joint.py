"""Before anything moves: that all ranks were given parts of one pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from ferro import FerroError, ProcessGroup, UsageError

from ..nn.module import Module
from ..nn.parameter import Parameter
from .build import build
from .check import check
from .schedule import PipelineSchedule
from .ties import Tie


def joint_schedule(
    modules: Sequence[Module],
    group: ProcessGroup,
    schedule: str | PipelineSchedule,
    microbatches: int,
    ties: Sequence[Tie],
) -> PipelineSchedule:
    """Return the schedule that all ranks go by, proved to work, with stages and ties that fit.

    Raises:
        UsageError: a rank's arguments do not fit, or ranks differ; raised on every rank, and
            nothing was changed.
    """
    made: PipelineSchedule | None = None
    own: FerroError | None = None
    said: dict[str, object] = {}
    try:
        _check_list(modules)
        made = _schedule(schedule, group.world_size, len(modules), microbatches)
        numbers = made.stages_of(group.rank)
        _check_stages(modules, numbers)
        tied = _tied(ties, dict(zip(numbers, modules, strict=True)), made.stages)
        each = str(len(modules)) if isinstance(schedule, str) else "that of the schedule"
        said = {"facts": _facts(made, each, ties), "tied": tied}
    except FerroError as error:
        own = error
    said["fault"] = "" if own is None else str(own)
    everyones: list[dict[str, object]] = group.all_gather_object(said)
    if own is not None:
        raise own
    _check_faults(group, [str(other["fault"]) for other in everyones])
    _check_equal(group, [other["facts"] for other in everyones])  # type: ignore[misc]
    _check_tied(group, [other["tied"] for other in everyones])  # type: ignore[misc]
    assert made is not None
    return made


def named(module: Module) -> dict[str, Parameter]:
    """Return a stage's parameters by their names in it."""
    return dict(module.named_parameters())


def _schedule(
    schedule: str | PipelineSchedule, ranks: int, stages: int, microbatches: int
) -> PipelineSchedule:
    if isinstance(schedule, str):
        if not stages:
            raise UsageError("Pipeline: the list of stages is empty. Give every rank one or more.")
        made = build(schedule, ranks=ranks, stages_per_rank=stages, microbatches=microbatches)
    else:
        made = schedule
        if made.microbatches != microbatches or made.ranks != ranks:
            raise UsageError(
                f"Pipeline: the schedule {made.name!r} is for {made.ranks} ranks and "
                f"{made.microbatches} microbatches, not for {ranks} and {microbatches}."
            )
    check(made)
    return made


def _check_list(stages: object) -> None:
    if isinstance(stages, Module) or not isinstance(stages, Sequence):
        raise UsageError(
            f"Pipeline: the stages are a {type(stages).__name__}, not a list. Pass [stage], or "
            "several."
        )


def _check_stages(modules: Sequence[Module], numbers: Sequence[int]) -> None:
    for module in modules:
        if not isinstance(module, Module):
            raise UsageError(f"Pipeline: a stage is a {type(module).__name__}, not a Module.")
    if len(modules) != len(numbers):
        raise UsageError(
            f"Pipeline: by the schedule this rank has the stages {list(numbers)}, and got "
            f"{len(modules)} modules."
        )
    if len({id(module) for module in modules}) != len(modules):
        raise UsageError(
            "Pipeline: one module is given for two stages. Give each its own, and say in `ties` "
            "which parameters are shared."
        )


def _tied(ties: Sequence[Tie], modules: Mapping[int, Module], stages: int) -> list[list[str]]:
    """Say, for each tie, what this rank's copies are like."""
    found: list[list[str]] = []
    seen: set[tuple[int, str]] = set()
    for tie in ties:
        # {0: …, stages - 1: …} names one stage where there is but one: then nothing is tied.
        if len(tie) < min(2, stages) or not all(0 <= stage < stages for stage in tie):
            raise UsageError(
                f"Pipeline: the tie {dict(tie)} must name two stages or more, of 0 to {stages - 1}."
            )
        for stage, name in tie.items():
            if (stage, name) in seen:
                raise UsageError(
                    f"Pipeline: {name!r} of stage {stage} is in two ties. Put all copies in one."
                )
            seen.add((stage, name))
        found.append([])
        for stage in sorted(set(tie) & set(modules)):
            parameter = named(modules[stage]).get(tie[stage])
            if parameter is None:
                raise UsageError(
                    f"Pipeline: stage {stage} has no parameter {tie[stage]!r}, which a tie names; "
                    f"it has {', '.join(named(modules[stage])) or 'none'}."
                )
            found[-1].append(_in_words(parameter))
    return found


def _in_words(parameter: Parameter) -> str:
    """Say all that must be the same of tied copies."""
    data = parameter.data
    splits = "".join(
        f", split along {'all' if split.dim is None else split.dim}" for split in parameter.splits
    )
    return f"{data.dtype} {data.shape}{splits}{'' if parameter.requires_grad else ', frozen'}"


def _facts(schedule: PipelineSchedule, each: str, ties: Sequence[Tie]) -> dict[str, str]:
    """Return what must be the same on every rank, by what it is called.

    Args:
        schedule: by which the rank would go.
        each: how many stages the rank has, where all must have as many.
        ties: those the rank was given.
    """
    orders = repr((schedule.actions, schedule.splits_backward)).encode()
    return {
        "schedule": schedule.name,
        "microbatches": str(schedule.microbatches),
        "number of stages": each,
        "ranks of the stages": str(list(schedule.rank_of)),
        "ties": str([sorted(tie.items()) for tie in ties]),
        "actions (digest)": hashlib.sha256(orders).hexdigest()[:16],
    }


def _check_faults(group: ProcessGroup, faults: Sequence[str]) -> None:
    for rank, fault in enumerate(faults):
        if fault:
            raise _refusal(group, rank, f"rank {rank} cannot take part: {fault.rstrip('.')}.")


def _check_equal(group: ProcessGroup, everyones: Sequence[Mapping[str, str]]) -> None:
    for rank, facts in enumerate(everyones):
        for what, value in facts.items():
            if value != everyones[0][what]:
                raise _refusal(
                    group,
                    rank,
                    f"ranks differ in the {what}: rank 0 has {everyones[0][what]}, rank {rank} "
                    f"has {value}. Give the same on every rank.",
                )


def _check_tied(group: ProcessGroup, everyones: Sequence[Sequence[Sequence[str]]]) -> None:
    first: dict[int, str] = {}
    for rank, tied in enumerate(everyones):
        for index, copies in enumerate(tied):
            for copy in copies:
                if copy != first.setdefault(index, copy):
                    raise _refusal(
                        group,
                        rank,
                        f"the copies of tie {index} differ: one is {first[index]}, on rank {rank} "
                        f"one is {copy}.",
                    )


def _refusal(group: ProcessGroup, peer: int, what: str) -> UsageError:
    return UsageError(
        f"Pipeline on group {group.name!r}: {what} Nothing was changed.",
        group=group.name,
        rank=group.rank,
        peer=peer,
    )
