"""Modules say which pieces they hold: nested strategies, ties, buffers, generators, and what is refused."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import ferro
from ferro import UsageError
from ferro_strategies import DDP, FSDP, DeviceMesh, Pipeline, convert_sync_batchnorm, deferred, nn
from ferro_strategies import tensor_parallel as tp
from ferro_strategies.nn.checkpoint_piece import piece_like_parameter
from ferro_strategies.optim import SGD
from ferro_strategies.pipeline import Action, Kind, PipelineSchedule

from .assembler import Held, Saved, assemble, check_equal, copied


def simulate(work, ranks):
    return ferro.simulate(work, ranks, timeout_s=20, run_timeout_s=60)


def test_every_piece_is_live_and_may_be_empty():
    class Empty(nn.Module):
        def __init__(self):
            self.none = nn.Parameter(np.zeros((0, 3), np.float32))
            self.one = nn.Parameter(np.ones((), np.float64))

        def vjp(self, x):
            raise NotImplementedError

    def work(group):
        model = FSDP(nn.Sequential(Empty(), nn.Linear(2, 2, rng=0)), group)
        for name, piece in model.checkpoint_arrays().items():
            assert np.shares_memory(piece.data, dict(model.named_parameters())[name].data) or not piece.data.size
        return Held(model)

    found = Saved(simulate(work, 3)).model
    assert found["layers.0.none"].shape == (0, 3)
    assert found["layers.0.one"] == 1


def test_strategies_that_are_parts_of_a_module_keep_their_names():
    """Also parameters that parts share: they are there once."""

    class Beside(nn.Module):
        def __init__(self, group):
            shared = nn.Linear(3, 3, rng=0)
            self.own = nn.Parameter(np.arange(3.0))
            self.first = shared
            self.sharded = FSDP(nn.Sequential(nn.Linear(3, 5, rng=1)), group)
            self.parts = {"replicated": nn.Sequential(shared, nn.BatchNorm(3))}

        def vjp(self, x):
            raise NotImplementedError

    def work(group):
        model = Beside(group)
        return Held(model), model.state_dict(), list(model.checkpoint_parameters())

    found = simulate(work, 2)
    saved = Saved([held for held, _, _ in found])
    check_equal(saved.model, found[0][1])
    assert found[0][2] == [name for name in saved.model if "running" not in name and "tracked" not in name]


def test_replicas_may_be_cut_elsewhere():
    """Where pieces of tensor parallelism are uneven, FSDP cuts what is whole elsewhere on each rank."""

    def net():
        return nn.Sequential(nn.Linear(2, 3, rng=0), nn.Linear(3, 2, rng=1))

    def work(group):
        mesh = DeviceMesh((2, 2), ("dp", "tp"), group)
        model = tp.parallelize(net(), mesh["tp"], {"layers.1": tp.RowParallelLinear.from_serial})
        return Held(FSDP(model, mesh["dp"], units=[]))

    held = simulate(work, 4)
    assert len({each.model["layers.0.bias"].flat for each in held}) == 4
    check_equal(Saved(held).model, net().state_dict())


def test_replicas_of_running_statistics_may_differ():
    """SyncBatchNorm has the names of BatchNorm."""

    def work(group):
        net = nn.Sequential(nn.Linear(3, 4, rng=0), nn.BatchNorm(4))
        if group.rank:
            net.layers[1].running_mean.data[...] = 7
        pieces = DDP(net, group, broadcast_buffers=False).checkpoint_arrays()
        net.layers[1].running_mean.data[...] = group.rank
        synchronised = convert_sync_batchnorm(net, group)
        assert pieces.keys() == synchronised.checkpoint_arrays().keys()
        return Held(synchronised)

    held = simulate(work, 2)
    assert {name for name, piece in held[0].model.items() if piece.replicas_may_differ} == {
        f"layers.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert not Saved(held).model["layers.1.running_mean"].any()


def test_deferred_parameters_are_drawn_for_a_load_and_refused_for_a_save():
    with deferred():
        net = nn.Linear(3, 2, rng=0)
    optimizer = SGD(net, lr=0.1, momentum=0.9)
    with pytest.raises(UsageError, match="has no value yet"):
        net.checkpoint_arrays()
    optimizer.prepare_checkpoint_load()
    net.prepare_checkpoint_load()
    other = nn.Linear(3, 2, rng=5)
    Saved([Held(other)]).load(0, net)
    check_equal(net.state_dict(), other.state_dict())


def test_a_class_that_overrides_state_dict_alone_is_refused():
    class Versioned(nn.Sequential):
        def state_dict(self):
            return super().state_dict() | {"version": np.array(1)}

    for model in (Versioned(nn.ReLU()), nn.Sequential(Versioned(nn.ReLU()))):
        with pytest.raises(UsageError, match="Versioned overrides state_dict and not checkpoint_arrays"):
            model.checkpoint_arrays()


def test_pieces_at_unknown_places_are_refused():
    group = ferro.simulate(lambda group: group, 1)[0]
    parameter = nn.Parameter(np.zeros(3, np.float32), name="weight")
    parameter.splits = (nn.Split(group=group, dim=0, shape=(3,)),)
    with pytest.raises(UsageError, match=r"parameter 'weight' is not known.* Split\(shape=..., start=...\)"):
        piece_like_parameter(parameter, parameter.data)
    flat = nn.Split(group=group, dim=None, shape=(3, 1), start=0)
    parameter.splits = (flat, nn.Split(group=group, dim=0, shape=(3,), start=0))
    with pytest.raises(UsageError, match="'weight' was cut again after it had been cut as a flat row"):
        piece_like_parameter(parameter, parameter.data)


def test_fsdp_is_saved_between_passes_only():
    class Saving(nn.Module):
        def __init__(self):
            self.weight = nn.Parameter(np.ones(3, np.float32))
            self.save = None

        def vjp(self, x):
            self.save()
            raise NotImplementedError

    def work(group):
        inner = Saving()
        model = FSDP(inner, group)
        optimizer = SGD(model, lr=0.1, momentum=0.9)
        optimizer.prepare_checkpoint_load()
        messages = []

        def save():
            for call in (model.checkpoint_arrays, lambda: optimizer.checkpoint_optimizer_arrays({})):
                with pytest.raises(UsageError) as error:
                    call()
                messages.append(str(error.value))

        inner.save = save
        with pytest.raises(NotImplementedError):
            model.vjp(np.ones(3, np.float32))
        return messages

    for first, second in simulate(work, 2):
        assert "not inside join() or a pass" in first
        assert "the state 'momentum' of parameter 'weight'" in second


F0, F1, F2 = (Action(kind=Kind.FORWARD, stage=stage, microbatch=0) for stage in range(3))
B0, B1, B2 = (Action(kind=Kind.BACKWARD, stage=stage, microbatch=0) for stage in range(3))
# The first and the last stage are on one rank.
THERE_AND_BACK = PipelineSchedule(
    name="there and back", microbatches=1, rank_of=(0, 1, 0), actions=((F0, F2, B2, B0), (F1, B1))
)


def test_copies_of_a_tied_parameter_on_one_rank_are_saved_once_and_loaded_all():
    def make(group, seed):
        tables = [nn.Linear(3, 3, bias=False, rng=seed + number) for number in range(3)]
        ties = [{0: "weight", 2: "weight"}]
        pipeline = Pipeline(tables[group.rank :: 2], group, schedule=THERE_AND_BACK, microbatches=1, ties=ties)
        optimizer = SGD(pipeline.parameters(), lr=0.1, momentum=0.9)
        return pipeline, optimizer

    def step(pipeline, optimizer):
        x = np.eye(3, dtype=np.float32)
        pipeline.step(x, x, nn.mse_loss)
        optimizer.step()
        optimizer.zero_grad()

    def work(group):
        pipeline, optimizer = make(group, 0)
        step(pipeline, optimizer)
        held = Held(pipeline, optimizer)
        step(pipeline, optimizer)
        return held, Held(pipeline, optimizer)

    found = simulate(work, 2)
    saved, end = Saved([held for held, _ in found]), Saved([held for _, held in found])
    assert list(saved.model) == ["layers.0.weight", "layers.1.weight"]

    def resumed(group):
        pipeline, optimizer = make(group, 9)
        saved.load(group.rank, pipeline, optimizer)
        copies = [item.data for item in pipeline.parameters()]
        assert all((copy == copies[0]).all() for copy in copies)
        step(pipeline, optimizer)
        return Held(pipeline, optimizer)

    found = Saved(simulate(resumed, 2))
    check_equal(found.model, end.model)
    check_equal(found.optimizers[0], end.optimizers[0])


def test_a_pipelines_names_are_those_of_a_sequential_of_its_stages():
    def stages():
        return [nn.Sequential(nn.Linear(2, 2, rng=0), nn.Dropout(rng=3)), nn.Residual(nn.Linear(2, 2, rng=1))]

    def work(group):
        mesh = DeviceMesh((1, 2), ("dp", "pp"), group)
        stage = DDP(stages()[mesh["pp"].rank], mesh["dp"])
        return Held(Pipeline([stage], mesh["pp"], microbatches=1))

    held = simulate(work, 2)
    whole = nn.Sequential(*stages())
    check_equal(Saved(held).model, whole.state_dict())
    assert held[0].values[0]["generators"].keys() == whole.generator_state_dict().keys()
    assert held[1].values[0] is None


def test_generators_keep_their_states_where_the_layout_of_ranks_is_another():
    """Otherwise those that draw alike on all ranks under tensor parallelism would get states of ranks of DDP."""

    def net():
        return nn.Sequential(nn.Linear(4, 4, rng=0), nn.Dropout(rng=1), nn.Linear(4, 4, rng=2))

    def replicated(group):
        return DDP(net(), group).checkpoint_values()

    values = simulate(replicated, 2)
    assert values[0] != values[1]

    def work(group):
        model = tp.parallelize(
            net(), group, {"layers.0": partial(tp.ColumnParallelLinear.from_serial, gather_output=True)}
        )
        before = model.checkpoint_values()
        for value in (values[group.rank], net().checkpoint_values(), None):
            model.load_checkpoint_values(value)
        assert model.checkpoint_values() == before
        alone = DDP(net(), group.subgroup([group.rank]))
        alone.module.layers[1].rng.random(3)
        alone.load_checkpoint_values(net().checkpoint_values())
        assert alone.checkpoint_values() == net().checkpoint_values()
        return before

    found = simulate(work, 2)
    assert found[0] == found[1]


def test_generators_that_differ_are_told(caplog):
    net = nn.Sequential(nn.Dropout(rng=0), nn.Linear(2, 2, rng=0))
    value = net.checkpoint_values()
    net.layers[0].rng.random(5)
    later = net.checkpoint_values()
    assert nn.Linear(2, 2).checkpoint_values() is None
    net.load_checkpoint_values(value | {"generators": {"x.rng": value["generators"]["layers.0.rng"]}})
    assert "'layers.0.rng' is new; 'x.rng' is gone" in caplog.messages[-1]
    net.load_checkpoint_values(None)
    assert net.checkpoint_values() == later
    net.load_checkpoint_values(value)
    assert net.checkpoint_values() == value
    assert len(caplog.messages) == 1


def test_generators_of_another_kind_are_refused():
    net = nn.Dropout(rng=0)
    philox = nn.Dropout(rng=np.random.Generator(np.random.Philox(0)))
    for value, message in (
        (philox.checkpoint_values(), "random generator 'rng' is a PCG64, and a Philox in the checkpoint"),
        ({"seed": 3}, "expected the random generators of a module"),
    ):
        with pytest.raises(UsageError, match=message):
            net.load_checkpoint_values(value)


def test_the_pieces_of_the_docs_page_make_up_arrays():
    page = (Path(__file__).parents[3] / "docs" / "writing-a-strategy.md").read_text()
    scope = {}
    for block in re.findall(r"```python\n(# my_strategy/(?:averaged|rows|counts).*?)```", page, re.DOTALL):
        exec(block, scope)

    def work(group):
        model = scope["keep_rows"](nn.Linear(5, 3, rng=0), group)
        optimizer = SGD(model, lr=0.1, momentum=0.9)
        counts = scope["Counts"](7, group)
        counts.counts += group.rank
        return Held(model, optimizer), copied(counts.checkpoint_arrays())

    found = simulate(work, 3)
    saved = Saved([held for held, _ in found])
    check_equal(saved.model, nn.Linear(5, 3, rng=0).state_dict())
    assert saved.optimizers[0]["bias.momentum"].shape == (3,)
    assert assemble([counts for _, counts in found])["counts"].tolist() == [0, 0, 1, 1, 2, 2, 2]
