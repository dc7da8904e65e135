"""What is no module and no optimizer: its state is arrays, numbers and texts that a checkpoint can hold."""

import json

import numpy as np
import pytest

import ferro
from ferro import UsageError
from ferro_strategies import DDP, ShardedSampler, data, hooks, nn
from ferro_strategies.optim import LossScaler
from ferro_strategies.training import EarlyStopping


def test_a_loss_scaler_has_values_and_no_arrays():
    scaler, other = LossScaler(initial_scale=8.0), LossScaler()
    assert scaler.checkpoint_arrays() == {}
    other.load_checkpoint_values(json.loads(json.dumps(scaler.checkpoint_values())))
    assert other.current_scale == 8.0
    with pytest.raises(UsageError, match="expected a positive 'scale'"):
        other.load_checkpoint_values({"scale": -1.0, "steps_in_a_row": 0})


def test_samplers_loaders_and_early_stopping_have_numbers_alone():
    def work(group):
        sampler = ShardedSampler(9, group)
        loader = data.DataLoader(np.arange(9), ShardedSampler(9, group), batch_size=2)
        next(iter(sampler.batches(2)))
        next(iter(loader))
        stopping = EarlyStopping(3)
        assert not stopping.update(1.0)
        return [each.state_dict() for each in (sampler, loader, stopping)]

    one, other = ferro.simulate(work, 2, timeout_s=20)
    assert one == other == json.loads(json.dumps(one))


def test_powersgds_state_is_this_ranks_own_arrays_and_texts():
    def work(group):
        hook = hooks.PowerSGD()
        assert hook.checkpoint_values_by_rank
        model = DDP(nn.Linear(64, 64, rng=0), group, hook=hook)
        y, pullback = model.vjp(np.full((1, 64), group.rank, np.float32))
        pullback(y)
        state = hook.state_dict()
        again = hooks.PowerSGD()
        again.load_state_dict(state)
        assert again.state_dict() == state
        return {name: value if isinstance(value, str) else value.dtype.kind for name, value in state.items()}

    for found in ferro.simulate(work, 2, timeout_s=20):
        assert set(found) == {"0.steps", "0.qs", "0.generator", "0.error.1"}
        assert json.loads(found.pop("0.generator"))["bit_generator"] == "PCG64"
        assert set(found.values()) == {"i", "f"}
