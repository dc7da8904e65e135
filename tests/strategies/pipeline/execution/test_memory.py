"""A pipeline's stages hold what the schedule promises, and nothing when a step is over."""

import gc
import weakref

import numpy as np
import pytest

from ferro_strategies.nn import Linear, Module, Sequential, cross_entropy, mse_loss
from ferro_strategies.pipeline import Pipeline, build, check

from .pipeline_models import batch, make_stages, share, simulate

SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1"]


class Saved:
    """Stands for what a pullback keeps."""


class Counting(Module):
    """Knows how many of its pullbacks there are."""

    def __init__(self, stage, alive):
        self.stage = stage
        self._alive = alive
        self.most = 0

    def vjp(self, x):
        y, pull = self.stage.vjp(x)
        saved = Saved()
        self._alive.add(saved)
        self.most = max(self.most, len(self._alive))

        def pullback(grad, saved=saved):
            return pull(grad)

        return y, pullback


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ranks", "per_rank"), [(3, 1), (2, 2), (1, 2)])
def test_no_more_is_held_than_the_schedule_promises(schedule, ranks, per_rank):
    inputs, targets = batch(rows=8)
    plan = build(schedule, ranks=ranks, stages_per_rank=per_rank, microbatches=8)
    promised = check(plan).peak_activations

    def run(group):
        alive = weakref.WeakSet()
        stages = [Counting(s, alive) for s in share(make_stages(ranks * per_rank), group)]
        pipeline = Pipeline(stages, group, schedule=schedule, microbatches=8)
        pipeline.step(inputs, targets, cross_entropy)
        return pipeline.peak_activations, max(stage.most for stage in stages), len(alive)

    for rank, (counted, alive, left) in enumerate(simulate(run, ranks)):
        assert counted == promised[rank]
        assert alive <= promised[rank]  # a split pass frees the pullback before its products
        if not plan.splits_backward:
            assert alive == promised[rank]
        assert left == 0


def test_nothing_of_a_step_is_left():
    class Big(Module):
        def __init__(self, made):
            self._made = made

        def vjp(self, x):
            y = x + 1
            self._made.append(weakref.ref(y))
            return y, lambda grad: grad

    made = [[], []]

    def run(group):
        stage = Sequential(Linear(3, 3, dtype=np.float64), Big(made[group.rank]))
        pipeline = Pipeline([stage], group, microbatches=2)
        pipeline.step(np.ones((4, 3)), np.zeros((4, 3)), mse_loss)
        group.barrier()
        return pipeline

    pipelines = simulate(run, 2)
    gc.collect()
    assert len(pipelines) == 2
    assert [ref() for refs in made for ref in refs] == [None] * 4
