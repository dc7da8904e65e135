"""When one rank fails, all learn where and why, soon, and none goes on with half a step."""

import itertools

import numpy as np
import pytest

import ferro
from ferro.simulated import Fault
from ferro_strategies.nn import Linear, Module, cross_entropy, mse_loss
from ferro_strategies.pipeline import Pipeline

from .pipeline_models import Trap, batch, failing, make_stages, share, simulate

SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("half", ["forward", "backward"])
@pytest.mark.parametrize("microbatch", [0, 3])
def test_every_rank_learns_what_failed_where(schedule, rank, half, microbatch):
    inputs, targets = batch(rows=8)

    def run(group):
        stages = share(make_stages(6), group)
        if group.rank == rank:
            stages[1] = Trap(stages[1], half, microbatch)
        pipeline = Pipeline(stages, group, schedule=schedule, microbatches=4)
        first = failing(lambda: pipeline.step(inputs, targets, cross_entropy))
        again = failing(lambda: pipeline.step(inputs, targets, cross_entropy))
        total = int(group.all_reduce(np.array(1)))  # the group is as good as before
        return first, again, total

    place = f"the {half} pass of stage {rank + 3}, microbatch {microbatch}"
    for own, (first, again, total) in enumerate(simulate(run, 3)):
        if own == rank:
            assert type(first) is KeyError
            assert first.__notes__ == [f"(Pipeline.step: on rank {rank}, in {place})"]
        else:
            assert type(first) is ferro.FerroError
            assert f"failed on rank {rank}, in {place}: KeyError: 'trap'" in str(first)
            assert (first.rank, first.peer, first.group) == (own, rank, "world")
        assert isinstance(again, ferro.UsageError)
        assert "an earlier Pipeline.step failed" in str(again)
        assert total == 3


def test_two_failures_are_both_told():
    def run(group):
        stage = Trap(Linear(2, 2), "forward", 0) if group.rank != 1 else Linear(2, 2)
        pipeline = Pipeline([stage], group, microbatches=1)
        x = np.ones((1, 2), np.float32)
        return failing(lambda: pipeline.step(x, x, mse_loss))

    first, second, third = simulate(run, 3)
    assert isinstance(first, KeyError)
    assert second.peer == third.peer == 0  # rank 2 only stopped: nothing came to its stage


BATCHES = {
    "got None. Pass them": (None, np.zeros((4, 1))),
    "list of 3 microbatches, where microbatches=2. Pass one array for each, or one to be cut; or, "
    "on every rank, microbatches=3": ([np.zeros((1, 1))] * 3, np.zeros((4, 1))),
    "single number": (np.zeros(()), np.zeros((4, 1))),
    "expected a NumPy or CuPy array, got builtins.str": ("text", np.zeros((4, 1))),
}


@pytest.mark.parametrize("message", BATCHES)
def test_a_batch_that_cannot_be_cut_is_told_to_all(message):
    inputs, targets = BATCHES[message]

    def run(group):
        pipeline = Pipeline([Linear(1, 1, dtype=np.float64)], group, microbatches=2)
        return failing(lambda: pipeline.step(inputs, targets, mse_loss))

    for rank, error in enumerate(simulate(run, 2)):
        assert message in str(error)
        assert isinstance(error, ferro.UsageError) == (rank == 0)


def test_a_loss_that_raises_names_the_microbatch():
    def run(group):
        pipeline = Pipeline([Linear(1, 1, dtype=np.float64)], group, microbatches=2)
        x = np.zeros((4, 1))
        return failing(lambda: pipeline.step(x, np.zeros((4, 2)), mse_loss))

    first, second = simulate(run, 2)
    assert "forward pass of stage 1, microbatch 0: UsageError: mse_loss" in str(first)
    assert isinstance(second, ferro.UsageError)


def test_a_stage_in_the_middle_must_have_an_input_gradient():
    class Deaf(Module):
        def vjp(self, x):
            return x, lambda grad: None

    def run(group):
        stage = Deaf() if group.rank else Linear(1, 1, dtype=np.float64)
        pipeline = Pipeline([stage], group, microbatches=1)
        x = np.zeros((2, 1))
        return failing(lambda: pipeline.step(x, x, mse_loss))

    for error in simulate(run, 2):
        assert "stage 1 (Deaf) has no gradient for its input" in str(error)


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("after", [12, 30])
def test_a_rank_that_dies_leaves_nobody_waiting(victim, after):
    inputs, targets = batch(rows=8)

    def run(group):
        pipeline = Pipeline(share(make_stages(3), group), group, microbatches=4)

        def train():
            for _ in range(20):
                pipeline.step(inputs, targets, cross_entropy)

        error = failing(train)
        assert "an earlier Pipeline.step failed" in str(failing(train))
        return error

    errors = ferro.simulate(
        run, 3, timeout_s=5, run_timeout_s=20, faults=[Fault(rank=victim, after=after, kind="kill")]
    )
    for rank, error in enumerate(errors):
        assert isinstance(error, ferro.FerroError) == (rank != victim)
        if isinstance(error, ferro.PeerLost):
            assert (error.group, error.rank, error.peer) == ("world", rank, victim)
            assert f"ead rank {victim}'s log first" in str(error)


def test_forward_fails_like_a_step():
    inputs, _ = batch(rows=4)

    def run(group):
        stages = share(make_stages(3), group)
        if group.rank == 1:
            stages[0] = Trap(stages[0], "forward", 1)
        pipeline = Pipeline(stages, group, microbatches=4)
        return failing(lambda: pipeline.forward(inputs, microbatches=2))

    for rank, error in enumerate(simulate(run, 3)):
        assert isinstance(error, KeyError) == (rank == 1)
        if rank != 1:
            assert "Pipeline.forward on group 'world' failed on rank 1" in str(error)


CALLS = {
    "step": lambda pipeline: pipeline.step(*batch(rows=8), cross_entropy),
    "forward 1": lambda pipeline: pipeline.forward(batch(rows=8)[0]),
    "forward 2": lambda pipeline: pipeline.forward(batch(rows=8)[0], microbatches=2),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("usual", "odd"), [*itertools.permutations(CALLS, 2)])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_ranks_in_different_calls_learn_so_at_once(schedule, usual, odd, rank):
    def run(group):
        pipeline = Pipeline(share(make_stages(6), group), group, schedule=schedule, microbatches=4)
        return failing(lambda: CALLS[odd if group.rank == rank else usual](pipeline))

    words = {
        "step": "Pipeline.step with microbatches=4",
        "forward 1": "Pipeline.forward with microbatches=1",
        "forward 2": "Pipeline.forward with microbatches=2",
    }
    for error in simulate(run, 3):  # none of them waits for its deadline
        assert not isinstance(error, TimeoutError)
        assert words[usual] in str(error)
        assert words[odd] in str(error)
        assert "in the same order, with the same number of microbatches" in str(error)
