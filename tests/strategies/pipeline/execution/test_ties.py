"""Tied weights across stages: one parameter with several homes."""

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies import FSDP, DeviceMesh
from ferro_strategies.nn import Embedding, Linear, Module, Parameter, Sequential, Unembedding, cross_entropy, mse_loss
from ferro_strategies.optim import SGD
from ferro_strategies.pipeline import Pipeline

from .pipeline_models import WORDS, gradients, make_tied_stages, share, simulate


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1"])
@pytest.mark.parametrize(("ranks", "count"), [(1, 2), (2, 2), (2, 4), (3, 3), (3, 6)])
def test_tied_copies_train_like_one_parameter(schedule, ranks, count):
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, WORDS, (2, 5, 3)) for _ in range(3)]
    model = Sequential(*make_tied_stages(count, tied=True))
    optimizer = SGD(model.parameters(), lr=0.1)
    for x, labels in batches:
        y, pullback = model.vjp(x)
        pullback(cross_entropy(y, labels)[1])
        optimizer.step()
        optimizer.zero_grad()

    def run(group):
        pipeline = Pipeline(
            share(make_tied_stages(count, tied=False), group),
            group,
            schedule=schedule,
            microbatches=2,
            ties=[{0: "weight", count - 1: "layers.0.weight"}],
        )
        optimizer = SGD(pipeline.parameters(), lr=0.1)
        for x, labels in batches:
            pipeline.step(x, labels, cross_entropy)
            optimizer.step()
            optimizer.zero_grad()
        return pipeline.state_dict()

    states = {}
    for state in simulate(run, ranks):
        states |= state
    first, last = states["0.weight"], states[f"{count - 1}.layers.0.weight"]
    np.testing.assert_array_equal(first, last)
    np.testing.assert_allclose(first, model.layers[0].weight.data, rtol=1e-11)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_of_tied_copies_accumulate_over_steps(ranks):
    x, labels = np.random.default_rng(1).integers(0, WORDS, (2, 5, 3))

    def run(group):
        stages = share(make_tied_stages(4, tied=False), group)
        ties = [{0: "weight", 3: "layers.0.weight"}]
        pipeline = Pipeline(stages, group, microbatches=2, ties=ties)
        pipeline.step(x, labels, cross_entropy)
        once = gradients(pipeline)
        pipeline.step(x, labels, cross_entropy)
        return once, gradients(pipeline)

    for once, twice in simulate(run, ranks):
        for name, grad in once.items():
            np.testing.assert_allclose(twice[name], 2 * grad, rtol=1e-12, err_msg=name)


def test_ties_on_overlapping_sets_of_ranks_sum_over_each():
    """Four scalings on four ranks; every pair of neighbours, and all four, share something."""

    class Scale(Module):
        def __init__(self, number):
            self.ring = [Parameter(np.full(1, 2.0 + number)) for _ in range(2)]
            self.all = Parameter(np.full(1, 3.0 + number))

        def vjp(self, x):
            uses = [item.use() for item in (*self.ring, self.all)]

            def pullback(grad):
                for use in uses:
                    use.add_grad(np.full(1, float(grad.sum())))
                return grad

            return x, pullback

    ties = [{s: "ring.0", (s + 1) % 4: "ring.1"} for s in (2, 0, 3, 1)]
    ties.append(dict.fromkeys(range(4), "all"))

    def run(group):
        pipeline = Pipeline([Scale(group.rank)], group, microbatches=2, ties=ties)
        pipeline.step(np.ones((2, 1)), np.ones((2, 1)), lambda y, t: (0.0, np.ones_like(y)))
        return pipeline.state_dict(), gradients(pipeline)

    for rank, (state, grads) in enumerate(simulate(run, 4)):
        single = 2.0  # two microbatches, of half the weight, with one row and one use each, twice
        np.testing.assert_allclose(grads[f"{rank}.all"], 4 * single / 2)
        for place in range(2):
            np.testing.assert_allclose(grads[f"{rank}.ring.{place}"], 2 * single / 2)
        assert state[f"{rank}.all"] == 3.0
        lowest = {0: min(rank, (rank + 1) % 4), 1: min(rank, (rank - 1) % 4)}
        for place, first in lowest.items():
            assert state[f"{rank}.ring.{place}"] == 2.0 + first


def test_copies_without_gradient_count_as_zero():
    class Part(Module):
        """Adds a gradient of ones to one of its parameters."""

        def __init__(self, used):
            self.a, self.b = Parameter(np.ones(2)), Parameter(np.ones(2))
            self._used = used

        def vjp(self, x):
            use = getattr(self, self._used).use()

            def pullback(grad):
                use.add_grad(np.ones(2))
                return grad

            return x, pullback

    def run(group):
        ties = [{0: "a", 1: "a"}, {0: "b", 1: "b"}]
        pipeline = Pipeline([Part("ab"[group.rank])], group, microbatches=1, ties=ties)
        pipeline.step(np.ones((1, 1)), np.ones((1, 1)), lambda y, t: (0.0, np.ones_like(y)))
        return gradients(pipeline)

    for rank, grads in enumerate(simulate(run, 2)):
        np.testing.assert_array_equal(grads[f"{rank}.a"], [1.0, 1.0])
        np.testing.assert_array_equal(grads[f"{rank}.b"], [1.0, 1.0])


def test_in_one_stage_there_is_nothing_to_tie():
    """{0: …, stages - 1: …} is then a dict of one."""

    def run(group):
        stage = Linear(2, 2, dtype=np.float64, rng=0)
        x = np.ones((2, 2))
        y, pullback = stage.vjp(x)
        pullback(mse_loss(y, x)[1])
        expected = stage.weight.grad.copy()
        stage.zero_grad()
        pipeline = Pipeline([stage], group, microbatches=1, ties=[{0: "weight"}])
        pipeline.step(x, x, mse_loss)
        np.testing.assert_array_equal(stage.weight.grad, expected)
        return True

    assert simulate(run, 1) == [True]


FAULTS = {
    "must name two stages": [{0: "weight"}],
    "of 0 to 1": [{0: "weight", 2: "weight"}],
    "'weight' of stage 0 is in two ties": [{0: "weight", 1: "weight"}] * 2,
    "stage 1 has no parameter 'wait'": [{0: "weight", 1: "wait"}],
    r"copies of tie 0 differ: one is float64 \(2, 2\), on rank 1 one is float64 \(2,\)": [{0: "weight", 1: "bias"}],
}


@pytest.mark.parametrize("message", FAULTS)
def test_ties_that_do_not_fit_are_refused_on_every_rank(message):
    def run(group):
        stage = Linear(2, 2, dtype=np.float64, rng=group.rank)
        before = stage.weight.data.copy()
        with pytest.raises(ferro.UsageError, match=message):
            Pipeline([stage], group, microbatches=1, ties=FAULTS[message])
        np.testing.assert_array_equal(stage.weight.data, before)
        return True

    assert simulate(run, 2) == [True, True]


def test_tied_copies_in_other_units_are_refused_with_the_remedy():
    """FSDP cuts a unit of several parameters elsewhere than one of the tied parameter alone."""

    def stages():
        table = Embedding(4, 2, dtype=np.float64, rng=0)
        return Sequential(table, Linear(2, 2, dtype=np.float64, rng=1)), Sequential(Unembedding(table))

    def make(world, **options):
        mesh = DeviceMesh((2, 2), ("dp", "pp"), world)
        stage = FSDP(stages()[mesh["pp"].rank], mesh["dp"], **options)
        ties = [{0: "layers.0.weight", 1: "layers.0.weight"}]
        return Pipeline([stage], mesh["pp"], microbatches=2, ties=ties)

    def run(world):
        with pytest.raises(
            ferro.UsageError, match=r"piece of a flat row.* units of their own: FSDP\(stage, group, units="
        ):
            make(world, units=[])
        labels = np.array([0, 1, 2, 3])
        return make(world, units=lambda _, module: isinstance(module, Embedding | Unembedding)).step(
            labels, labels, cross_entropy
        )

    model = Sequential(*stages())
    labels = np.array([0, 1, 2, 3])
    assert simulate(run, 4) == pytest.approx([cross_entropy(model(labels), labels)[0]] * 4)


def test_half_precision_copies_add_up_in_single_precision():
    """256 + 1 is 256 in bfloat16."""

    class Half(Module):
        def __init__(self, grad):
            self.weight = Parameter(np.ones(1, ml_dtypes.bfloat16))
            self._grad = np.array([grad], ml_dtypes.bfloat16)

        def vjp(self, x):
            use = self.weight.use()

            def pullback(grad):
                use.add_grad(self._grad)
                return grad

            return x, pullback

    def run(group):
        ties = [{0: "weight", 2: "weight"}]
        stages = share([Half(64), Half(1), Half(0.25)], group)
        pipeline = Pipeline(stages, group, microbatches=4, ties=ties)
        pipeline.step(np.ones((4, 1)), np.ones((4, 1)), lambda y, t: (0.0, np.ones_like(y)))
        return {name: float(item.grad[0]) for name, item in pipeline.named_parameters()}

    for ranks in (1, 3):
        for grads in simulate(run, ranks):
            assert {name: grads[name] for name in grads if name != "1.weight"}.items() <= {
                "0.weight": 257.0,
                "2.weight": 257.0,
            }.items()
