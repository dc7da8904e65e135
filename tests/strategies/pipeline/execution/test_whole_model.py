"""What belongs to the whole model: norms, loss scales, states, and ranks that have nothing to train."""

import copy

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, DeviceMesh, nn, optim
from ferro_strategies.nn import BatchNorm, Dropout, Linear, Sequential, cross_entropy, mse_loss
from ferro_strategies.pipeline import Pipeline

from .pipeline_models import alone, batch, gradients, make_stages, make_tied_stages, share, simulate


@pytest.mark.parametrize("norm_type", [1, 2, 3.5, np.inf])
@pytest.mark.parametrize("tied", [False, True])
def test_norms_are_those_of_the_whole_model(norm_type, tied):
    inputs, targets = batch(rows=4)
    targets = targets % 3
    stages = make_tied_stages(3, tied=True) if tied else make_stages(3)
    alone([Sequential(*stages)], inputs, targets)
    norm = optim.clip_grad_norm(Sequential(*stages).parameters(), 0.01, norm_type)

    def run(group):
        own = share(make_tied_stages(3, tied=False) if tied else make_stages(3), group)
        ties = [{0: "weight", 2: "layers.0.weight"}] if tied else []
        pipeline = Pipeline(own, group, microbatches=2, ties=ties)
        pipeline.step(inputs, targets, cross_entropy)
        before = gradients(pipeline)
        method = pipeline.clip_grad_norm(1e9, norm_type)
        function = optim.clip_grad_norm(pipeline.parameters(), 0.01, norm_type)
        assert method == function
        for name, grad in gradients(pipeline).items():
            np.testing.assert_allclose(grad, before[name] * 0.01 / function)
        return function

    assert simulate(run, 3) == pytest.approx([norm] * 3, rel=1e-12)


def test_stages_skip_a_step_together():
    """The gradient of one stage overflows in float16, that of the other does not."""

    def run(group):
        stage = Linear(2, 2, dtype=np.float16, rng=group.rank)
        if group.rank == 1:
            stage.weight.data[...] = 1e-3
        pipeline = Pipeline([stage], group, microbatches=2)
        optimizer = optim.SGD(pipeline.parameters(), lr=0.1)
        scaler = optim.LossScaler(initial_scale=2.0**16)

        def loss(y, t):
            value, grad = mse_loss(y, t)
            return value, scaler.scale(grad)

        told = []
        for _ in range(3):
            with np.errstate(over="ignore"):
                pipeline.step(np.ones((4, 2), np.float16), np.full((4, 2), 3.0, np.float16), loss)
            told.append((scaler.step(optimizer), scaler.current_scale))
            optimizer.zero_grad()
        return told

    first, second = simulate(run, 2)
    assert first == second
    assert first[0] == (False, 2.0**15)


@pytest.mark.parametrize("last", [Sequential(nn.ReLU(), nn.Flatten()), None])
def test_a_rank_with_nothing_to_train_takes_part_in_all_decisions(last):
    """It has no parameters, or only frozen ones."""
    x, t = np.random.default_rng(0).standard_normal((4, 3)), np.zeros((4, 2))

    def stages():
        first, second = Linear(3, 2, dtype=np.float64, rng=0), Linear(2, 2, dtype=np.float64, rng=1)
        for item in second.parameters():
            item.requires_grad = False
        return first, second if last is None else copy.deepcopy(last)

    model = Sequential(*stages())
    optimizer = optim.SGD([item for item in model.parameters() if item.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(2):
        y, pullback = model.vjp(x)
        pullback(mse_loss(y, t)[1])
        norm = optim.clip_grad_norm(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    def run(group):
        pipeline = Pipeline([stages()[group.rank]], group, microbatches=2)
        trained = [item for item in pipeline.parameters() if item.requires_grad]
        assert len(trained) == [2, 1][group.rank]
        optimizer = optim.SGD(trained, lr=0.1, momentum=0.9)
        scaler = optim.LossScaler(initial_scale=4.0)
        for step in range(2):
            pipeline.step(x, t, lambda y, t: (0.0, scaler.scale(mse_loss(y, t)[1])))
            scaler.unscale(optimizer)
            told = optim.clip_grad_norm(pipeline.parameters(), 0.1)
            assert scaler.step(optimizer)
            optimizer.zero_grad()
            if step == 0:
                saved = pipeline.full_optimizer_state_dict(optimizer)
                optimizer.load_state_dict(optimizer.state_dict())
                pipeline.load_full_optimizer_state_dict(optimizer, saved)
        assert not [name for name in pipeline.state_dict() if "nothing" in name]
        return told, pipeline.state_dict()

    results = simulate(run, 2)
    assert [told for told, _ in results] == pytest.approx([norm] * 2, rel=1e-12)
    for name, value in results[0][1].items():
        np.testing.assert_allclose(value, dict(model.layers[0].state_dict())[name[2:]], rtol=1e-12)


def parts(group, stage):
    """A stage whose parts are wrapped one by one, and one whose every part is plain."""
    if stage == 0:
        body = FSDP(Sequential(Linear(4, 4, dtype=np.float64, rng=1), Dropout(0.0, rng=3)), group)
        return Sequential(DDP(Linear(3, 4, dtype=np.float64, rng=0), group), body)
    return Sequential(BatchNorm(4, dtype=np.float64), Linear(4, 2, dtype=np.float64, rng=2))


def test_states_of_wrapped_parts_are_whole_and_a_training_goes_on_from_them():
    x, t = np.random.default_rng(0).standard_normal((8, 3)), np.zeros((8, 2))

    def make(world):
        mesh = DeviceMesh((world.world_size // 2, 2), ("dp", "pp"), world)
        pipeline = Pipeline([parts(mesh["dp"], mesh["pp"].rank)], mesh["pp"], microbatches=2)
        return pipeline, optim.AdamW(pipeline.parameters(), 0.1), mesh["dp"]

    def step(pipeline, optimizer, replicas):
        part = slice(replicas.rank, None, replicas.world_size)
        pipeline.step(x[part], t[part], mse_loss)
        for item in pipeline.parameters():  # the second stage is in no wrapper
            if item.name.startswith("1."):
                item.grad = replicas.all_reduce(item.grad, "mean")
        optimizer.step()
        pipeline.zero_grad()
        assert all(item.grad is None for item in pipeline.parameters())

    def train(world):
        pipeline, optimizer, replicas = make(world)
        step(pipeline, optimizer, replicas)
        saved = pipeline.state_dict(), optimizer.state_dict(), pipeline.generator_state_dict()
        step(pipeline, optimizer, replicas)
        return saved, pipeline.state_dict()

    results = simulate(train, 4)
    state, generators, final = {}, {}, {}
    for (own, _, own_generators), after in results[:2]:
        state, generators, final = state | own, generators | own_generators, final | after
    shapes = {name: array.shape for name, array in state.items()}
    assert shapes["0.layers.1.layers.0.weight"] == (4, 4)
    assert len(generators) == 1

    def resume(world):
        pipeline, optimizer, replicas = make(world)
        pipeline.load_state_dict(state)
        pipeline.load_generator_state_dict({name: generators[name] for name in pipeline.generator_state_dict()})
        optimizer.load_state_dict(results[world.rank][0][1])
        step(pipeline, optimizer, replicas)
        return pipeline.state_dict()

    found = {}
    for own in simulate(resume, 4)[:2]:
        found |= own
    assert found.keys() == final.keys()
    for name, array in final.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-12, err_msg=name)


def test_a_state_that_does_not_fit_one_stage_is_loaded_in_none():
    def run(group):
        pipeline = Pipeline([Linear(2, 2, dtype=np.float64, rng=group.rank)], group, microbatches=1)
        before = pipeline.state_dict()
        whole = before | {f"{1 - group.rank}.weight": np.ones((2, 2)), f"{1 - group.rank}.bias": np.ones(2)}
        whole["0.weight"], whole["1.bias"] = whole["0.weight"] + 1, np.ones(3)
        with pytest.raises(ferro.UsageError, match=r"'1?\.?bias' is float64 \(2,\), given float64 \(3,\)"):
            pipeline.load_state_dict(whole)
        for name, array in pipeline.state_dict().items():
            np.testing.assert_array_equal(array, before[name])

    simulate(run, 2)


def test_modes_go_through_stages_and_copies_are_refused():
    def run(group):
        stage = DDP(Sequential(Dropout(0.5), Linear(2, 2)), group)
        pipeline = Pipeline([stage], group.split(group.rank), microbatches=1)
        assert pipeline.eval() is pipeline
        assert not any(module.training for module in (pipeline, *stage.modules()))
        assert all(module.training for module in (pipeline.train(), *stage.modules()))
        with pytest.raises(ferro.UsageError, match=r"cannot be copied.*Copy the stages"):
            copy.deepcopy(pipeline)

    simulate(run, 2)


def test_buffers_of_replicas_start_each_step_equal():
    def run(world):
        mesh = DeviceMesh((2, 2), ("dp", "pp"), world)
        norm = BatchNorm(2, dtype=np.float64)
        stage = Sequential(norm, Linear(2, 2, dtype=np.float64, rng=0))
        pipeline = Pipeline([DDP(stage, mesh["dp"])], mesh["pp"], microbatches=2)
        means = []
        for step in range(3):
            x = np.random.default_rng((mesh["dp"].rank, step)).standard_normal((8, 2)) + 10 * mesh["dp"].rank
            pipeline.step(x, np.zeros((8, 2)), mse_loss)
            means.append((x.mean(axis=0), norm.running_mean.data.copy()))
        return means

    results = simulate(run, 4)
    first = np.zeros(2)
    for (own, kept), (other, also) in zip(results[0], results[2], strict=True):
        np.testing.assert_allclose(kept, 0.9 * first + 0.1 * own, rtol=1e-12)
        np.testing.assert_allclose(also, 0.9 * first + 0.1 * other, rtol=1e-12)
        first = kept
