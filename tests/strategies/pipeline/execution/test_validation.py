"""Pipelines whose ranks were given stages, schedules or ties that do not fit are refused."""

import numpy as np
import pytest

import ferro
from ferro_strategies.nn import Linear, Sequential
from ferro_strategies.pipeline import Action, Kind, Pipeline, PipelineSchedule

from .pipeline_models import simulate


def swapped():
    """A schedule whose only rank would go backward first."""
    actions = (Action(Kind.BACKWARD, 0, 0), Action(Kind.FORWARD, 0, 0))
    return PipelineSchedule(name="swapped", microbatches=1, rank_of=(0, 1), actions=(actions, ()))


ARGUMENTS = {
    "ranks differ in the microbatches: rank 0 has 1, rank 1 has 2": lambda r: {"microbatches": 1 + r},
    "ranks differ in the schedule: rank 0 has 1f1b, rank 1 has gpipe": lambda r: {
        "microbatches": 2,
        "schedule": ["1f1b", "gpipe"][r],
    },
    "ranks differ in the ties": lambda r: {"microbatches": 2, "ties": [{0: "weight", 1: "weight"}] * r},
    "no pipeline schedule 'best'": lambda r: {"microbatches": 2, "schedule": "best"},
    "swapped": lambda r: {"microbatches": 1, "schedule": swapped()},
    "is for 2 ranks and 1 microbatches, not for 2 and 3": lambda r: {"microbatches": 3, "schedule": swapped()},
}


@pytest.mark.parametrize("message", ARGUMENTS)
def test_ranks_that_do_not_fit_are_refused_together(message):
    def run(group):
        with pytest.raises(ferro.UsageError, match=message):
            Pipeline([Linear(2, 2)], group, **ARGUMENTS[message](group.rank))
        return int(group.all_reduce(np.array(1)))

    assert simulate(run, 2) == [2, 2]


STAGES = {
    r"number of stages: rank 0 has 1, rank 1 has 2\. Give .* rank\. Nothing was changed\.": (
        lambda r: [Linear(2, 2) for _ in range(1 + r)]
    ),
    r"the list of stages is empty\. Give every rank one or more\.": lambda r: [],
    r"the list of stages is empty\. Give every rank one or more\.( Nothing was changed\.)?$": (
        lambda r: [Linear(2, 2)] * r
    ),
    r"the stages are a Linear, not a list\. Pass \[stage\]": lambda r: Linear(2, 2),
    r"the stages are a Sequential, not a list": (lambda r: Sequential(Linear(2, 2)) if r else [Linear(2, 2)]),
    "a stage is a float, not a Module": lambda r: [1.5],
    "one module is given for two stages": lambda r: [Linear(2, 2)] * 2,
}


@pytest.mark.parametrize("message", STAGES)
def test_stages_that_do_not_fit_are_refused_together(message):
    def run(group):
        with pytest.raises(ferro.UsageError, match=message):
            Pipeline(STAGES[message](group.rank), group, microbatches=2)

    simulate(run, 2)


def test_one_ranks_fault_is_told_to_the_others():
    def run(group):
        stages = [Linear(2, 2)] if group.rank else ["no module"]
        with pytest.raises(ferro.UsageError, match=r"not a Module") as caught:
            Pipeline(stages, group, microbatches=2)
        return str(caught.value)

    own, other = simulate(run, 2)
    assert own.startswith("Pipeline: a stage is a str")
    assert "rank 0 cannot take part: Pipeline: a stage is a str" in other
