"""join: ranks with different numbers of batches end with one model."""

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, hooks
from ferro_strategies.nn import BatchNorm, Linear, Module, Parameter, ReLU, Sequential, mse_loss
from ferro_strategies.optim import SGD, AdamW, LossScaler, clip_grad_norm

SMALL = {"bucket_bytes": 128, "first_bucket_bytes": 64}


def simulate(function, world_size):
    return ferro.simulate(function, world_size, timeout_s=10, run_timeout_s=30)


def build():
    return Sequential(Linear(3, 8, dtype=np.float64, rng=0), ReLU(), Linear(8, 2, dtype=np.float64, rng=1))


def batch(rank, step):
    rng = np.random.default_rng((rank, step))
    return rng.standard_normal((4, 3)), rng.standard_normal((4, 2))


def step_on(model, optimizer, x, target, scale=1.0):
    y, pullback = model.vjp(x)
    pullback(mse_loss(y, target)[1] * scale)
    optimizer.step()
    optimizer.zero_grad()


def alone(counts, *, divide_by_all):
    """Train in one process on the batches that the ranks have at each step."""
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    for step in range(max(counts)):
        active = [rank for rank, count in enumerate(counts) if step < count]
        parts = [batch(rank, step) for rank in active]
        x, target = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        step_on(model, optimizer, x, target, len(active) / len(counts) if divide_by_all else 1.0)
    return model.state_dict()


@pytest.mark.parametrize("divide_by_all", [False, True])
@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("counts", [(3, 1), (1, 3), (0, 2, 4), (2, 2), (2, 0, 0, 1)], ids=str)
def test_uneven_batches_train_like_one_process(counts, find_unused, divide_by_all):
    def run(group):
        model = DDP(build(), group, find_unused=find_unused, **SMALL)
        optimizer = SGD(model.parameters(), lr=0.1)
        with model.join(divide_by_initial_world_size=divide_by_all):
            for step in range(counts[group.rank]):
                step_on(model, optimizer, *batch(group.rank, step))
        assert all(item.grad is None for item in model.parameters())
        return model.state_dict()

    expected = alone(counts, divide_by_all=divide_by_all)
    results = simulate(run, len(counts))
    for name, value in expected.items():
        for result in results:
            np.testing.assert_allclose(result[name], value, rtol=0, atol=1e-12, err_msg=name)
            np.testing.assert_array_equal(result[name], results[0][name])


def test_no_batches_at_all():
    def run(group):
        model = DDP(build(), group)
        with model.join():
            pass
        return model.state_dict()

    for result in simulate(run, 2):
        np.testing.assert_array_equal(result["layers.0.weight"], build().layers[0].weight.data)


def test_buffers_come_from_ranks_that_still_have_batches():
    counts = (1, 3, 2)

    def run(group):
        model = DDP(Sequential(Linear(3, 2, rng=0), BatchNorm(2)), group)
        optimizer = SGD(model.parameters(), lr=0.1)
        with model.join():
            for step in range(counts[group.rank]):
                x, target = batch(group.rank, step)
                step_on(model, optimizer, x.astype(np.float32), target.astype(np.float32))
            if group.rank == 1:
                last = model.module.layers[1].running_mean.data.copy()
        state = model.state_dict()
        if group.rank == 1:
            np.testing.assert_array_equal(state["layers.1.running_mean"], last)
        return state

    results = simulate(run, 3)
    assert int(results[0]["layers.1.num_batches_tracked"]) == 3
    for name, value in results[0].items():
        for other in results:
            np.testing.assert_array_equal(other[name], value, err_msg=name)


def accumulate(model, microbatches, *, in_flight):
    """Go forward and backward with all microbatches: one by one, or all forward first."""
    *first, last = microbatches
    if in_flight:
        passes = [(model.vjp(x), target) for x, target in microbatches]
        for (y, pullback), target in passes:
            pullback(mse_loss(y, target)[1])
        return
    with model.no_sync():
        for x, target in first:
            y, pullback = model.vjp(x)
            pullback(mse_loss(y, target)[1])
    y, pullback = model.vjp(last[0])
    pullback(mse_loss(y, last[1])[1])


@pytest.mark.parametrize("in_flight", [False, True])
def test_accumulation_inside_join(in_flight):
    counts = (1, 2)

    def run(group):
        model = DDP(build(), group, **SMALL)
        with model.join():
            for step in range(counts[group.rank]):
                parts = [batch(group.rank, 2 * step), batch(group.rank, 2 * step + 1)]
                accumulate(model, parts, in_flight=in_flight)
            return {name: item.grad.copy() for name, item in model.named_parameters()}

    results = simulate(run, 2)
    model = build()
    for step, ranks in ((0, (0, 1)), (1, (1,))):
        for rank in ranks:
            for part in range(2):
                x, target = batch(rank, 2 * step + part)
                y, pullback = model.vjp(x)
                pullback(mse_loss(y, target)[1] / len(ranks))
    # Rank 1 accumulates over both steps. Rank 0 sends nothing in the second one, and the sum is
    # divided by the one rank that does.
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(results[1][name], parameter.grad, atol=1e-12, err_msg=name)


def test_leaving_join_in_the_middle_of_a_step_is_refused():
    def run(group):
        model = DDP(build(), group)

        def train():
            with model.join():
                kept = model.vjp(batch(group.rank, 0)[0])
                y, pullback = model.vjp(batch(group.rank, 1)[0])
                pullback(y)
            return kept

        with pytest.raises(ferro.UsageError, match="have not been run"):
            train()

    simulate(run, 2)


@pytest.mark.parametrize("hook", [hooks.float16, hooks.PowerSGD()], ids=["float16", "powersgd"])
def test_hooks_work_inside_join(hook):
    counts = (1, 3)

    def run(group):
        mine = hooks.PowerSGD() if isinstance(hook, hooks.PowerSGD) else hook
        model = DDP(build(), group, hook=mine, **SMALL)
        optimizer = SGD(model.parameters(), lr=0.1)
        with model.join():
            for step in range(counts[group.rank]):
                step_on(model, optimizer, *batch(group.rank, step))
        return model.state_dict()

    first, second = simulate(run, 2)
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)


class Fork(Module):
    """Two parameters, of which a pass may leave out the second."""

    def __init__(self):
        self.used, self.unused = Parameter(np.ones(1)), Parameter(np.ones(1))

    def vjp(self, x):
        used = self.used.use()
        return x, used.add_grad


def test_unused_parameters_are_named_on_ranks_that_have_joined_too():
    def run(group):
        model = DDP(Fork(), group)

        def train():
            with model.join():
                if group.rank == 1:
                    y, pullback = model.vjp(np.ones(1))
                    pullback(y)

        with pytest.raises(ferro.UsageError, match=r"rank 1: unused\."):
            train()

    simulate(run, 2)


def test_ranks_at_different_steps_are_told():
    def run(group):
        model = DDP(Sequential(Linear(3, 2, rng=0), BatchNorm(2)), group)
        if group.rank == 0:
            model.eval()  # which gives no step for buffers

        def train():
            with model.join():
                y, pullback = model.vjp(np.ones((4, 3), np.float32))
                pullback(y)

        words = r"different steps \(rank 0: BACKWARD, rank 1: BUFFERS\)"
        with pytest.raises(ferro.UsageError, match=words):
            train()

    simulate(run, 2)


def test_an_error_inside_join_is_raised_at_once():
    def run(group):
        model = DDP(build(), group)
        with model.join(), pytest.raises(ferro.UsageError, match="inside join"), model.join():
            pass
        with pytest.raises(KeyError), model.join():
            raise KeyError
        optimizer = SGD(model.parameters(), lr=0.1)
        step_on(model, optimizer, *batch(group.rank, 0))

    simulate(run, 2)


OPTIMIZERS = {
    "momentum": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: AdamW(parameters, lr=0.05),
}


def train_epochs(model, make, counts, rank, *, reductions, named):
    """Train two epochs in which ranks have uneven numbers of batches; each step has several backward passes."""
    optimizer = make(model.parameters())
    scaler = LossScaler(initial_scale=4.0, growth_interval=2)
    for epoch in range(2):
        with model.join(*([optimizer] if named else []), scaler=scaler):
            for step in range(counts[rank]):
                optimizer.lr = 0.1 / (1 + epoch + step)
                for number in range(reductions):
                    x, target = batch(rank, 100 * epoch + 10 * step + number)
                    y, pullback = model.vjp(x)
                    pullback(scaler.scale(mse_loss(y, target)[1]))
                scaler.unscale(optimizer)
                clip_grad_norm(model.parameters(), 0.5)
                scaler.step(optimizer)
                optimizer.zero_grad()
    return model.state_dict(), optimizer.state_dict(), scaler.current_scale


def epochs_alone(make, counts, *, reductions, divide_by_all):
    model = build()
    optimizer = make(model.parameters())
    for epoch in range(2):
        for step in range(max(counts)):
            optimizer.lr = 0.1 / (1 + epoch + step)
            active = [rank for rank, count in enumerate(counts) if step < count]
            for number in range(reductions):
                parts = [batch(rank, 100 * epoch + 10 * step + number) for rank in active]
                x, target = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
                y, pullback = model.vjp(x)
                pullback(mse_loss(y, target)[1] * (len(active) / len(counts) if divide_by_all else 1.0))
            clip_grad_norm(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("reductions", [1, 3])
@pytest.mark.parametrize("divide_by_all", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("counts", "named"), [((3, 2), True), ((0, 2, 3), False)], ids=str)
def test_optimizers_with_state_train_epochs_like_one_process(counts, named, optimizer, divide_by_all, reductions):
    make = OPTIMIZERS[optimizer]

    def run(group):
        model = DDP(build(), group, find_unused=reductions == 3, **SMALL)
        joins = model.join
        model.join = lambda *given, **options: joins(*given, divide_by_initial_world_size=divide_by_all, **options)
        return train_epochs(model, make, counts, group.rank, reductions=reductions, named=named)

    expected = epochs_alone(make, counts, reductions=reductions, divide_by_all=divide_by_all)
    for state, moments, scale in simulate(run, len(counts)):
        assert scale == 32.0
        for found, wanted in zip((state, moments), expected, strict=True):
            assert set(found) == set(wanted)
            for name, value in wanted.items():
                np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-12, err_msg=name)


def test_a_rank_that_leaves_with_gradients_of_its_own_is_told():
    def run(group):
        model = DDP(build(), group)
        leaves = pytest.raises(ferro.UsageError, match=r"leaves with gradients that no_sync\(\) has accumulated")
        with leaves, model.join(), model.no_sync():
            y, pullback = model.vjp(batch(0, 0)[0])
            pullback(y)

    simulate(run, 2)


def test_ranks_with_other_optimizers_are_told():
    def run(group):
        model = DDP(build(), group)
        optimizers = [SGD(model.parameters(), lr=0.1)] * (group.rank == 0)
        with pytest.raises(ferro.UsageError, match=r"different optimizers.*rank 0: SGD; rank 1: none"), model.join():
            pass
        return optimizers

    simulate(run, 2)
