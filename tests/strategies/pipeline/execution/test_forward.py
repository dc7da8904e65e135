"""A pipeline's outputs alone, and its state."""

import numpy as np
import pytest

import ferro
from ferro_strategies.nn import Sequential, cross_entropy
from ferro_strategies.optim import SGD
from ferro_strategies.pipeline import Pipeline

from .pipeline_models import batch, make_stages, share, simulate


@pytest.mark.parametrize("microbatches", [1, 4, 6])
@pytest.mark.parametrize("per_rank", [1, 2])
def test_forward_gives_the_outputs_where_the_last_stage_is(microbatches, per_rank):
    inputs, _ = batch(rows=5)
    expected = Sequential(*make_stages(3 * per_rank))(inputs)

    def run(group):
        pipeline = Pipeline(share(make_stages(3 * per_rank), group), group, microbatches=2)
        outputs = pipeline.forward(inputs if group.rank == 0 else None, microbatches=microbatches)
        assert all(item.outstanding_uses == 0 for item in pipeline.parameters())
        return outputs

    first, second, last = simulate(run, 3)
    assert first is None
    assert second is None
    np.testing.assert_allclose(last, expected, rtol=1e-12)


def test_a_pipeline_generates_between_steps():
    """Each token goes from the last rank to the first by an ordinary broadcast."""
    inputs, targets = batch(rows=4)

    def run(group):
        pipeline = Pipeline(share(make_stages(2), group), group, microbatches=2)
        optimizer = SGD(pipeline.parameters(), lr=0.1)
        pipeline.step(inputs, targets, cross_entropy)
        optimizer.step()
        optimizer.zero_grad()
        text = [1]
        for _ in range(3):
            logits = pipeline.eval().forward(np.array([text]))
            token = None if logits is None else int(logits[0, -1].argmax())
            text.append(group.broadcast_object(token, root=1))
        pipeline.train().step(inputs, targets, cross_entropy)
        return text

    model = Sequential(*make_stages(2))
    optimizer = SGD(model.parameters(), lr=0.1)
    y, pullback = model.vjp(inputs)
    pullback(cross_entropy(y, targets)[1])
    optimizer.step()
    text = [1]
    for _ in range(3):
        text.append(int(model(np.array([text]))[0, -1].argmax()))
    assert simulate(run, 2) == [text, text]


def test_states_merge_to_the_whole_and_load_from_it():
    def run(group):
        pipeline = Pipeline(share(make_stages(4), group), group, microbatches=2)
        names = [item.name for item in pipeline.parameters()]
        assert names == [name for name, _ in pipeline.named_parameters()]
        return pipeline.state_dict()

    whole = {}
    for state in simulate(run, 2):
        assert not whole.keys() & state.keys()
        whole |= state
    expected = {
        f"{number}.{name}": value
        for number, stage in enumerate(make_stages(4))
        for name, value in stage.state_dict().items()
    }
    assert whole.keys() == expected.keys()
    changed = {name: value + 1 for name, value in expected.items()}

    def load(group):
        pipeline = Pipeline(share(make_stages(4), group), group, microbatches=2)
        pipeline.load_state_dict(changed)
        with pytest.raises(ferro.UsageError, match=r"'4\.weight' does not begin with the number"):
            pipeline.load_state_dict({"4.weight": np.ones(1)})
        with pytest.raises(ferro.UsageError, match="missing"):
            pipeline.load_state_dict({})
        return pipeline.state_dict()

    for state in simulate(load, 2):
        for name, value in state.items():
            np.testing.assert_array_equal(value, changed[name])


def test_half_a_pass_is_refused():
    def run(group):
        pipeline = Pipeline(share(make_stages(2), group), group, microbatches=2)
        with pytest.raises(ferro.UsageError, match=r"call step.*or forward"):
            pipeline(np.zeros((1, 1), int))
        with pytest.raises(ferro.UsageError, match="microbatches is 0"):
            pipeline.forward(None, microbatches=0)

    simulate(run, 2)
