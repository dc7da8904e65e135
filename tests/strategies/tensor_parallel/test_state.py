"""State dicts of tensor-parallel modules, to those of serial modules and back."""

from functools import partial

import numpy as np
import pytest

import ferro
from ferro_strategies import FSDP, DeviceMesh, nn
from ferro_strategies import tensor_parallel as tp

from .models import F64, simulate


def test_a_model_sharded_twice_loads_the_whole_state():
    def model(group):
        return tp.parallelize(
            nn.Sequential(nn.Linear(4, 5, dtype=F64, rng=0), nn.LayerNorm(5, dtype=F64)),
            group,
            {"layers.0": partial(tp.ColumnParallelLinear.from_serial, gather_output=True)},
        )

    def run(group):
        mesh = DeviceMesh((2, 2), ("dp", "tp"), group)
        sharded = FSDP(model(mesh["tp"]), mesh["dp"])
        whole = tp.full_state_dict(sharded, sharded.full_state_dict())
        changed = {name: value + 1 for name, value in whole.items()}
        tp.load_full_state_dict(sharded, changed, sharded.full_state_dict())
        loaded = tp.full_state_dict(sharded, sharded.full_state_dict())
        for name, value in changed.items():
            np.testing.assert_array_equal(loaded[name], value, err_msg=name)
        return whole["layers.0.weight"].shape

    assert simulate(run, 4) == [(4, 5)] * 4


def test_a_model_sharded_by_fsdp_needs_its_local_state():
    whole = nn.Linear(4, 5, dtype=F64, rng=0)

    def run(group):
        layer = tp.ColumnParallelLinear.from_serial(whole, group)
        shards = layer.state_dict()
        layer.weight.splits += (nn.Split(group=group, dim=None),)
        with pytest.raises(ferro.UsageError, match=r"'weight' is also cut as one flat row.*local"):
            tp.full_state_dict(layer)
        with pytest.raises(ferro.UsageError, match=r"Pass local=.*FSDP.*full_state_dict\(\)"):
            tp.load_full_state_dict(layer, whole.state_dict())
        with pytest.raises(ferro.UsageError, match="local state lacks parameter 'bias'"):
            tp.full_state_dict(layer, {"weight": shards["weight"]})
        full = tp.full_state_dict(layer, shards)
        local = tp.local_state_dict(layer, full, shards)
        for name, own_shard in shards.items():
            np.testing.assert_array_equal(local[name], own_shard)
        return full

    for full in simulate(run, 2):
        np.testing.assert_array_equal(full["weight"], whole.weight.data)


def test_a_parameter_sharded_over_two_groups_is_gathered():
    whole = nn.Linear(6, 5, dtype=F64, rng=0)

    def run(group):
        outer, inner = group.split(group.rank % 2), group.split(group.rank // 2)
        layer = tp.ColumnParallelLinear.from_serial(whole, outer)
        for parameter, dim in ((layer.weight, 0), (layer.bias, 0)):
            own_shard = np.array_split(parameter.data, 2, axis=dim)[inner.rank]
            parameter.hold(own_shard.copy(), grad=None, grad_memory=None)
            parameter.splits += (nn.Split(group=inner, dim=dim),)
        own, full = layer.state_dict(), tp.full_state_dict(layer)
        tp.load_full_state_dict(layer, full)
        for name, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, own[name])
        return full

    for full in simulate(run, 4):
        np.testing.assert_array_equal(full["weight"], whole.weight.data)
        np.testing.assert_array_equal(full["bias"], whole.bias.data)


def test_a_state_that_does_not_fit_is_refused_and_nothing_loaded():
    def run(group):
        layer = tp.ColumnParallelLinear(4, 5, group, rng=0)
        before = layer.state_dict()
        state = tp.full_state_dict(layer)
        with pytest.raises(ferro.UsageError, match=r"'weight' is \(4, 5\) whole, given \(4, 6\)"):
            tp.load_full_state_dict(layer, state | {"weight": np.zeros((4, 6), np.float32)})
        with pytest.raises(ferro.UsageError, match="missing 'bias'; unexpected 'other'"):
            tp.load_full_state_dict(layer, {"weight": state["weight"], "other": before["bias"]})
        for name, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, before[name])

    simulate(run, 2)
