"""Every optimizer's state is saved as pieces, and a training goes on from it bit for bit."""

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro import UsageError
from ferro_strategies import DDP, FSDP, DeviceMesh, Pipeline, nn
from ferro_strategies import tensor_parallel as tp
from ferro_strategies.optim import (
    EMA,
    SGD,
    Adafactor,
    Adagrad,
    AdamW,
    CosineSchedule,
    Lion,
    Muon,
    decay_groups,
    matrices_and_others,
)

from .assembler import Held, Saved, check_equal


def muon_and_adamw(model):
    matrices, others = matrices_and_others(model)
    return Muon(matrices, lr=0.01), AdamW(others, lr=0.01)


def followed(model):
    optimizer = AdamW(decay_groups(model, 0.1), lr=0.01)
    optimizer.groups[1]["lr"] = 0.02
    optimizer.follow(CosineSchedule(6))
    return (optimizer,)


def averaged(model):
    optimizer = SGD(model, lr=0.01, momentum=0.9, nesterov=True)
    return optimizer, EMA(model, 0.5, optimizer=optimizer)


OPTIMIZERS = {
    "sgd": lambda model: (SGD(model, lr=0.01),),
    "followed": followed,
    "adafactor": lambda model: (Adafactor(model, lr=0.01),),
    "adagrad": lambda model: (Adagrad(model, lr=0.01),),
    "lion": lambda model: (Lion(model, lr=0.01),),
    "muon": muon_and_adamw,
    "averaged": averaged,
}
DTYPES = {"f": np.float32, "h": np.float16, "b": ml_dtypes.bfloat16, "c": np.complex64}
CASES = [(name, kind) for name in OPTIMIZERS for kind in DTYPES if kind != "c" or name not in ("adafactor", "muon")]


class Training:
    def __init__(self, wrap, group, kind, name, seed=0):
        dtype = DTYPES[kind]
        net = nn.Sequential(nn.Linear(5, 7, dtype=dtype, rng=seed), nn.Linear(7, 3, dtype=dtype, rng=seed + 1))
        self.model = wrap(net, group)
        self.optimizers = OPTIMIZERS[name](self.model)
        self.x = np.random.default_rng(group.rank).standard_normal((4, 5)).astype(dtype)

    def run(self, steps):
        for _ in range(steps):
            y, pullback = self.model.vjp(self.x)
            pullback(y * y.dtype.type(0.1))
            for optimizer in self.optimizers:
                if not isinstance(optimizer, EMA):
                    optimizer.step()
            self.model.zero_grad()
        return self

    def held(self):
        return Held(self.model, *self.optimizers)


def simulate(work, ranks):
    return ferro.simulate(work, ranks, timeout_s=20, run_timeout_s=60)


def plain(net, group):
    return net


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_training_goes_on_bit_for_bit(name, kind):
    """Also where it was saved before the first step, and is loaded by an optimizer that has made steps."""
    ranks, wrap = (2, FSDP) if kind != "b" else (2, DDP)

    def whole(group):
        training = Training(wrap, group, kind, name)
        return training.held(), training.run(2).held(), training.run(2).held()

    begun, middle, end = map(Saved, zip(*simulate(whole, ranks), strict=True))
    names = {key.rpartition(".")[2] for arrays in middle.optimizers for key in arrays}
    assert ("master" in names) == (kind in "hb")

    def resumed(group):
        found = []
        for saved, steps in ((begun, 4), (middle, 2)):
            fresh, trained = Training(wrap, group, kind, name, 5), Training(wrap, group, kind, name, 7).run(1)
            for training in (fresh, trained):
                saved.load(group.rank, training.model, *training.optimizers)
                found.append(training.run(steps).held())
        return found

    for held in zip(*simulate(resumed, ranks), strict=True):
        found = Saved(held)
        assert found.values == end.values
        check_equal(found.model, end.model)
        for own, other in zip(found.optimizers, end.optimizers, strict=True):
            check_equal(own, other)

    def one_process(group):
        training = Training(plain, group, kind, name, 3)
        middle.load(0, training.model, *training.optimizers)
        return training.held()

    found = Saved(simulate(one_process, 1))
    check_equal(found.model, middle.model)
    for own, other in zip(found.optimizers, middle.optimizers, strict=True):
        check_equal(own, other)


def names_of(model):
    return {id(item): name for name, item in model.checkpoint_parameters().items()}


def test_frozen_parameters_get_no_state():
    net = nn.Sequential(nn.Linear(2, 2, rng=0), nn.Linear(2, 2, rng=1))
    net.layers[0].weight.requires_grad = False
    found = SGD(net, lr=0.1, momentum=0.9).checkpoint_optimizer_arrays(names_of(net))
    assert list(found) == ["layers.0.bias.momentum", "layers.1.weight.momentum", "layers.1.bias.momentum"]


def test_parameters_without_names_are_called_by_position():
    net = nn.Linear(2, 2, rng=0)
    assert list(SGD(net, lr=0.1, momentum=0.9).checkpoint_optimizer_arrays({})) == ["0.momentum", "1.momentum"]


def test_one_name_for_two_parameters_is_refused():
    one, other = nn.Linear(2, 2, rng=0), nn.Linear(2, 2, rng=1)
    optimizer = SGD([*one.parameters(), *other.parameters()], lr=0.1, momentum=0.9)
    with pytest.raises(UsageError, match="two of its parameters are called 'weight'"):
        optimizer.checkpoint_optimizer_arrays(names_of(one) | names_of(other))


def test_values_that_do_not_fit_are_refused_and_change_nothing():
    net = nn.Linear(2, 2, rng=0)
    optimizer, scheduled = AdamW(net, lr=0.1), AdamW(net, lr=0.1)
    scheduled.follow(CosineSchedule(6))
    before = optimizer.checkpoint_values()
    for value, message in (
        (None, "expected the settings of a checkpoint, got None"),
        ({**before, "groups.0.momentum": 0.9}, "unexpected 'groups.0.momentum'"),
        ({**before, "groups.0.eps": -1.0}, "eps"),
        (scheduled.checkpoint_values(), r"call follow\(schedule\) before loading"),
    ):
        with pytest.raises(UsageError, match=message):
            optimizer.load_checkpoint_values(value)
        assert optimizer.checkpoint_values() == before


def test_a_state_that_does_not_fit_the_model_is_refused():
    net = nn.Linear(2, 2, rng=0)
    optimizer = SGD(net, lr=0.1, momentum=0.9)
    optimizer.prepare_checkpoint_load()
    net.weight.data = np.zeros((3, 2), np.float32)
    with pytest.raises(UsageError, match=r"the state 'momentum' of parameter 'weight' is float32 \(2, 2\)"):
        optimizer.checkpoint_optimizer_arrays(names_of(net))


def test_a_pipelines_optimizer_needs_the_pipelines_names():
    def work(group):
        pipeline = Pipeline([nn.Linear(2, 2, rng=group.rank)], group, microbatches=1)
        optimizer = SGD(pipeline.parameters(), lr=0.1, momentum=0.9)
        with pytest.raises(UsageError, match=r"is a part of a pipeline.* Put the pipeline into the state"):
            optimizer.checkpoint_optimizer_arrays({})
        return list(optimizer.checkpoint_optimizer_arrays(names_of(pipeline)))

    found = simulate(work, 2)
    assert found == [[f"layers.{rank}.{name}.momentum" for name in ("weight", "bias")] for rank in range(2)]


def test_a_rank_that_trains_nothing_saves_nothing():
    def work(group):
        stage = nn.Linear(2, 2, rng=0) if group.rank else nn.ReLU()
        pipeline = Pipeline([stage], group, microbatches=1)
        optimizer = SGD(pipeline.parameters(), lr=0.1, momentum=0.9)
        return [list(pipeline.checkpoint_arrays()), list(optimizer.checkpoint_optimizer_arrays(names_of(pipeline)))]

    assert simulate(work, 2)[0] == [[], []]


def test_adafactors_rows_and_columns_are_whole_on_every_rank():
    def work(group):
        mesh = DeviceMesh((2, 2), ("dp", "tp"), group)
        net = nn.Sequential(nn.Linear(4, 5, rng=0), nn.Linear(5, 3, rng=1))
        plan = {"layers.0": tp.ColumnParallelLinear.from_serial, "layers.1": tp.RowParallelLinear.from_serial}
        model = FSDP(tp.parallelize(net, mesh["tp"], plan), mesh["dp"])
        optimizer = Adafactor(model, lr=0.01)
        y, pullback = model.vjp(np.ones((2, 4), np.float32))
        pullback(y)
        optimizer.step()
        return Held(model, optimizer)

    state = Saved(simulate(work, 4)).optimizers[0]
    assert state["layers.0.weight.row"].shape == (4, 1)
    assert state["layers.0.weight.column"].shape == (1, 5)
    assert state["layers.0.bias.v"].shape == (5,)
