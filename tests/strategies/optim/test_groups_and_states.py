"""Parameter groups, the settings in state dicts, schedules, and states that do not fit."""

import copy
import pickle
import re

import numpy as np
import pytest

import ferro
from ferro_strategies import nn
from ferro_strategies.nn import Parameter
from ferro_strategies.optim import (
    SGD,
    Adafactor,
    AdamW,
    ChainedSchedule,
    CosineSchedule,
    LinearSchedule,
    Lion,
    Muon,
    OneCycleSchedule,
    StepSchedule,
    WarmUpSchedule,
    decay_groups,
    matrices_and_others,
)


def two_groups(optimizer_class=AdamW, **options):
    parameters = [Parameter(np.ones((2, 2))), Parameter(np.ones(3))]
    groups = [{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:], "weight_decay": 0.0}]
    return optimizer_class(groups, lr=0.1, **options)


def step(optimizer, count=1):
    for _ in range(count):
        for parameter in optimizer.parameters:
            parameter.grad = np.ones_like(parameter.data)
        optimizer.step()


def same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])


def test_each_group_has_its_settings():
    optimizer = two_groups(SGD, weight_decay=0.25)
    step(optimizer)
    assert (optimizer.parameters[0].data == 1 - 0.5 * 1.25).all()
    assert (optimizer.parameters[1].data == 1 - 0.1).all()
    optimizer.groups[1]["lr"] = np.float64(0.2)
    assert optimizer.lrs == [0.5, 0.2]
    assert type(optimizer.groups[1]["lr"]) is float
    assert optimizer.groups[1]["params"] == optimizer.parameters[1:]
    with pytest.raises(
        ferro.UsageError, match=re.escape('groups have lr [0.5, 0.2]. Assign to optimizer.groups[i]["lr"]')
    ):
        optimizer.lr = 0.3
    optimizer.nesterov, optimizer.lrs = False, [0.3, 0.3]
    optimizer.lr = 0.4
    assert optimizer.lrs == [0.4, 0.4]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda p: AdamW([{"params": [p], "momentum": 0.9}]),
            "AdamW has no setting 'momentum'. Its settings are betas",
        ),
        (lambda p: AdamW([{"params": [p], "lr": -1.0}]), "lr must be at least 0, got -1.0"),
        (lambda p: AdamW([{"params": [p], "betas": (0.9,)}]), r"betas is \(0.9,\), not like"),
        (lambda p: AdamW([{"params": [p], "lr": "fast"}]), "lr is 'fast', not like"),
        (lambda p: AdamW([{"params": [p]}, {"params": [p]}]), "group 1, item 0, .* given twice"),
        (lambda p: AdamW([{"lr": 0.1}]), 'group 0 has no "params", only'),
        (lambda p: AdamW([{"params": 3}]), "params is a int, not parameters"),
        (lambda p: AdamW([p, {"params": [p]}]), "item 1 is a dict, not a Parameter"),
        (lambda p: Muon([p]), "is no real matrix"),
        (lambda p: Muon([Parameter(np.ones((2, 2), complex))]), "is no real matrix"),
        (lambda p: Adafactor([Parameter(np.ones((2, 2), complex))]), "is complex; use AdamW"),
        (lambda p: Lion([p], betas=(0.9, 1.0)), "Lion: betas must be"),
        (lambda p: AdamW([p], betas=0.9), "AdamW: betas must be two numbers, got 0.9"),
        (lambda p: AdamW([p], lr="fast"), "AdamW: lr is 'fast'[.]$"),
        (lambda p: AdamW([p]).groups[0].__setitem__("eps", -1.0), "eps must be at least 0"),
    ],
)
def test_groups_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ferro.UsageError, match=message):
        build(Parameter(np.ones(3)))


def test_a_state_holds_all_settings_and_training_goes_on():
    first, whole = two_groups(betas=(0.5, 0.9)), two_groups(betas=(0.5, 0.9))
    step(first, 3)
    step(whole, 6)
    second = two_groups()
    for mine, theirs in zip(second.parameters, first.parameters, strict=True):
        mine.data[...] = theirs.data
    second.load_state_dict(first.state_dict())
    assert second.betas == (0.5, 0.9)
    assert second.lrs == [0.5, 0.1]
    step(second, 3)
    same(second.state_dict(), whole.state_dict())


def test_the_momentum_of_a_state_decides_what_it_consists_of():
    with_momentum, without = two_groups(SGD, momentum=0.5), two_groups(SGD)
    step(with_momentum)
    without.load_state_dict(with_momentum.state_dict())
    assert without.momentum == 0.5
    same(without.state_dict(), with_momentum.state_dict())


def test_a_part_of_a_state_is_refused():
    for make in (two_groups, lambda: two_groups(SGD, momentum=0.9)):
        optimizer = make()
        fresh = optimizer.state_dict()
        assert {"0.fresh", "1.fresh"} <= fresh.keys()
        step(optimizer)
        state = optimizer.state_dict()
        for lost in state:
            with pytest.raises(ferro.UsageError, match=f"{lost}.*Nothing was loaded"):
                optimizer.load_state_dict({name: array for name, array in state.items() if name != lost})
        without = {name: array for name, array in state.items() if not name.startswith("0.")}
        with pytest.raises(ferro.UsageError, match=r"missing '0\.m"):
            optimizer.load_state_dict(without)
        same(optimizer.state_dict(), state)
        optimizer.load_state_dict(fresh)
        assert optimizer.state == [{}, {}]


def test_states_from_files_and_from_before_there_were_groups(tmp_path):
    optimizer = AdamW([Parameter(np.ones(2))])
    step(optimizer)
    np.savez(tmp_path / "state.npz", **optimizer.state_dict())
    other = AdamW([Parameter(np.ones(2))])
    other.load_state_dict(np.load(tmp_path / "state.npz"))
    same(other.state_dict(), optimizer.state_dict())
    old = {name: array for name, array in optimizer.state_dict().items() if not name.startswith("groups")}
    other = AdamW([Parameter(np.ones(2))], lr=0.7)
    other.load_state_dict(old)
    assert other.lr == 1e-3
    other.load_state_dict({"lr": 0.25})
    assert (other.lr, other.state) == (0.25, [{}])
    with pytest.raises(ferro.UsageError, match="settings of one group, and there are 2"):
        two_groups().load_state_dict(old)


def test_state_that_does_not_fit_a_parameter_is_refused_at_the_step():
    optimizer = AdamW([Parameter(np.ones((2, 3)), name="w"), Parameter(np.ones(3))])
    step(optimizer)
    before = optimizer.state[1]["m"].copy()
    optimizer.parameters[0].hold(np.ones((3, 2)), grad=None, grad_memory=None)
    with pytest.raises(
        ferro.UsageError, match=r"'m' of parameter 'w' is float64 \(2, 3\), and .* now holds float64 \(3, 2\)"
    ):
        optimizer.step()
    np.testing.assert_array_equal(optimizer.state[1]["m"], before)
    optimizer.parameters[0].hold(np.ones((2, 3), np.float32), grad=None, grad_memory=None)
    with pytest.raises(ferro.UsageError, match=r"now holds float32 \(2, 3\)"):
        optimizer.step()


def test_a_parameter_that_the_model_no_longer_has_is_refused_at_the_step():
    parameter = Parameter(np.ones(2), name="head.weight")
    optimizer = SGD([parameter], lr=0.1)
    for owner in parameter.state_owners:
        owner.retire_parameter(parameter)
    with pytest.raises(ferro.UsageError, match=r"the model no longer has: 'head\.weight'"):
        optimizer.step()


# -- schedules ---------------------------------------------------------------------------------------


def test_a_schedule_is_followed_and_restored():
    schedule = WarmUpSchedule(2, CosineSchedule(4, end=0.5))
    optimizer = two_groups(SGD)
    optimizer.follow(schedule)
    found = []
    for _ in range(8):
        found.append(optimizer.groups[1]["lr"])
        step(optimizer)
    factors = [0, 0.5, 1, 0.9267766953, 0.75, 0.5732233047, 0.5, 0.5]
    np.testing.assert_allclose(found, 0.1 * np.array(factors), rtol=1e-9)
    resumed = two_groups(SGD)
    with pytest.raises(ferro.UsageError, match=r"call follow\(schedule\) before loading"):
        resumed.load_state_dict(optimizer.state_dict())
    first = two_groups(SGD)
    first.follow(schedule)
    step(first, 3)
    resumed.follow(schedule)
    resumed.load_state_dict(first.state_dict())
    assert resumed.lrs == first.lrs
    step(resumed, 5)
    same(resumed.state_dict(), optimizer.state_dict())


def test_changes_of_the_learning_rate_under_a_schedule_are_refused():
    optimizer = SGD([Parameter(np.ones(1))], lr=0.1)
    optimizer.follow(lambda step: 1 / (1 + step))
    step(optimizer)
    assert optimizer.lr == 0.05
    optimizer.lr = 0.3
    with pytest.raises(ferro.UsageError, match="while it follows a schedule"):
        step(optimizer)
    optimizer.follow(None)
    step(optimizer)
    assert optimizer.lr == 0.3


@pytest.mark.parametrize(
    "build",
    [
        lambda: CosineSchedule(0),
        lambda: LinearSchedule(0),
        lambda: WarmUpSchedule(0),
        lambda: StepSchedule(0),
        lambda: OneCycleSchedule(10, warm_up=1.0),
        lambda: WarmUpSchedule(10, 0.1),
        lambda: ChainedSchedule([]),
        lambda: ChainedSchedule([CosineSchedule(3)]),
        lambda: ChainedSchedule([(CosineSchedule, 3)]),
        lambda: SGD([], lr=0.1).follow(0.1),
        lambda: SGD([], lr=0.1).follow(CosineSchedule),
        lambda: ChainedSchedule([(CosineSchedule(1), None), (CosineSchedule(1), None)]),
    ],
)
def test_impossible_schedules_are_refused(build):
    with pytest.raises(ferro.UsageError):
        build()


# -- which parameters decay --------------------------------------------------------------------------


def model():
    embedding = nn.Embedding(7, 4, rng=0)
    return nn.Sequential(embedding, nn.LayerNorm(4), nn.Linear(4, 4, rng=1), nn.ReLU(), nn.Unembedding(embedding))


@pytest.mark.parametrize("wrap", [None, "DDP", "FSDP"])
def test_biases_norms_and_embeddings_do_not_decay(wrap):
    from ferro_strategies import DDP, FSDP

    def run(group):
        net = model()
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        wrapped = net if wrap is None else {"DDP": DDP, "FSDP": FSDP}[wrap](net, group)
        decaying, others = decay_groups(wrapped, 0.1)
        assert [names[id(parameter)] for parameter in decaying["params"]] == ["layers.2.weight"]
        assert len(others["params"]) == len(names) - 1
        assert AdamW([decaying, others]).groups[1]["weight_decay"] == 0
        matrices, rest = matrices_and_others(wrapped)
        assert ([names[id(parameter)] for parameter in matrices], len(rest)) == (["layers.2.weight"], len(names) - 1)

    ferro.simulate(run, 2, timeout_s=10)


# -- layers that change, copies ----------------------------------------------------------------------


def test_layers_that_are_replaced_or_added_are_noticed_by_an_optimizer_of_the_module():
    net = model()
    optimizer = SGD(net, lr=0.1)
    net.layers.append(nn.ReLU())
    step(optimizer)
    net.layers[2] = nn.Linear(4, 4, rng=7)
    with pytest.raises(ferro.UsageError, match=r"did not have when the SGD was made of it: 'layers\.2\.weight'"):
        optimizer.step()
    SGD(net, lr=0.1).step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_model_and_optimizer_trains_by_itself(copied):
    net = model()
    optimizer = AdamW(net, lr=0.1)
    optimizer.follow(CosineSchedule(5))
    optimizer.before_step(lambda: None)
    step(optimizer)
    twin, other = copied((net, optimizer))
    assert other.parameters == list(twin.parameters())
    assert other.groups[0].parameters == other.parameters
    kept = net.state_dict()
    step(other)
    same(net.state_dict(), kept)
    step(optimizer)
    same(other.state_dict(), optimizer.state_dict())
    same(twin.state_dict(), net.state_dict())
    assert [type(owner) for owner in other.parameters[0].state_owners] == [AdamW]
    other.groups[0]["lr"] = 0.5
    assert optimizer.lr != 0.5


def test_an_optimizer_that_is_dropped_owns_nothing_at_once():
    parameter = Parameter(np.ones(2))
    optimizer = AdamW([parameter])
    step(optimizer)
    del optimizer
    assert parameter.state_owners == []
