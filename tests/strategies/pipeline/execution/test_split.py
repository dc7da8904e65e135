"""A whole model, also one without arrays, is split into stages."""

import numpy as np
import pytest

import ferro
from ferro_strategies import deferred, split_model
from ferro_strategies.nn import Embedding, LayerNorm, Linear, ReLU, Sequential, Unembedding, cross_entropy
from ferro_strategies.pipeline import Pipeline

from .pipeline_models import WORDS, alone, gradients, simulate


def model():
    rng = np.random.default_rng(5)
    table = Embedding(WORDS, 4, dtype=np.float64, rng=rng)
    blocks = [
        Sequential(Linear(4, 4, dtype=np.float64, rng=rng), ReLU(), LayerNorm(4, dtype=np.float64)) for _ in "123"
    ]
    return Sequential(table, *blocks, Unembedding(table))


@pytest.mark.parametrize(
    ("ranks", "per_rank", "cuts", "firsts"),
    [(2, 1, None, [0, 3]), (2, 2, None, [0, 2, 3, 4]), (3, 1, [1, 4], [0, 1, 4]), (1, 2, [4], [0, 4]), (1, 1, [], [0])],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_split_model_trains_like_the_whole(ranks, per_rank, cuts, firsts, whole):
    x, labels = np.random.default_rng(1).integers(0, WORDS, (2, 4, 3))
    value, expected = alone([model()], x, labels)
    schedule = "interleaved_1f1b" if per_rank > 1 else "1f1b"

    def run(group):
        if whole:
            net = model()
        else:
            with deferred():
                net = model()
        split = split_model(net, group, stages_per_rank=per_rank, cuts=cuts)
        others = [p for layer in net for p in layer.parameters() if p.is_deferred]
        pipeline = Pipeline(split.stages, group, schedule=schedule, microbatches=2, ties=split.ties)
        kept = {id(item) for item in pipeline.parameters()}
        assert not any(item.is_deferred for item in pipeline.parameters())
        assert all(item.is_deferred for item in others if id(item) not in kept)
        return pipeline.step(x, labels, cross_entropy), gradients(pipeline)

    found = {}
    for loss, own in simulate(run, ranks):
        assert loss == pytest.approx(value, rel=1e-12)
        found |= own
    stage_of = {layer: max(stage for stage, first in enumerate(firsts) if first <= layer) for layer in range(5)}
    names = {name.removeprefix("0.layers."): grad for name, grad in expected.items()}
    for name, grad in names.items():
        layer, _, rest = name.partition(".")
        stage = stage_of[int(layer)]
        np.testing.assert_allclose(
            found[f"{stage}.layers.{int(layer) - firsts[stage]}.{rest}"], grad, rtol=1e-11, atol=1e-15
        )
    copies = [name for name in found if found[name].shape == (WORDS, 4)]
    assert len(copies) == (1 if ranks == 1 else 2)
    for name in copies:
        np.testing.assert_allclose(found[name], names["0.weight"], rtol=1e-11, atol=1e-15)


FAULTS = {
    r"5 layers cannot be split into 6 stages, 3 on each of 2 ranks": {"stages_per_rank": 3},
    r"cuts=\[3, 4\] must be 1 increasing numbers from 1 to 4": {"cuts": [3, 4]},
    r"cuts=\[5\] must be 1 increasing numbers": {"cuts": [5]},
    r"cuts=\[0\] must be 1 increasing numbers": {"cuts": np.array([0])},
}


@pytest.mark.parametrize("message", FAULTS)
def test_splits_that_do_not_fit_are_refused(message):
    def run(group):
        with pytest.raises(ferro.UsageError, match=message):
            split_model(model(), group, **FAULTS[message])
        with pytest.raises(ferro.UsageError, match="the model is a Linear, and must be a Sequential"):
            split_model(Linear(2, 2), group)

    simulate(run, 2)
