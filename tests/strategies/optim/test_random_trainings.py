"""Random trainings: any optimizer, wrapped and reloaded at any step, equals one process; FERRO_FUZZ_RUNS makes more."""

import os

import numpy as np
import pytest

import ferro
from ferro_strategies import FSDP, DeviceMesh, nn, optim
from ferro_strategies.fsdp import ShardingStrategy
from ferro_strategies.tensor_parallel import ColumnParallelLinear, RowParallelLinear, parallelize

RUNS = int(os.environ.get("FERRO_FUZZ_RUNS", "8"))
STEPS, ROWS = 5, 12
SHARDINGS = [sharding for sharding in ShardingStrategy if sharding is not ShardingStrategy.HYBRID_SHARD]
PLAN = {"layers.0": ColumnParallelLinear.from_serial, "layers.2": RowParallelLinear.from_serial}
OPTIMIZERS = [
    lambda net: optim.SGD(optim.decay_groups(net, 0.1), 0.05, momentum=0.9, nesterov=True),
    lambda net: optim.AdamW(optim.decay_groups(net, 0.1), 0.05),
    lambda net: optim.Adam(net, 0.03, weight_decay=0.1),
    lambda net: optim.Adagrad(net, 0.05),
    lambda net: optim.Lion(net, 0.01, weight_decay=0.3),
    lambda net: optim.Adafactor(net, 0.05),
    lambda net: optim.Muon(optim.matrices_and_others(net)[0], 0.05),
]


class RandomTraining:
    """One random model, its data, its optimizer, and the steps at which it is wrapped and reloaded."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.make = OPTIMIZERS[rng.integers(len(OPTIMIZERS))]
        self.inputs, self.hidden, self.outputs = (int(size) for size in rng.integers((1, 2, 1), (5, 7, 4)))
        self.tp, self.dp = int(rng.integers(1, 3)), int(rng.integers(1, 4))
        self.sharding = SHARDINGS[rng.integers(len(SHARDINGS))]
        self.wrap_at, self.reload_at = int(rng.integers(STEPS)), int(rng.integers(STEPS + 1))
        self.norm_type = (None, 1.0, 2.0, np.inf)[rng.integers(4)]
        self.x = rng.standard_normal((STEPS, ROWS, self.inputs))
        self.targets = rng.standard_normal((STEPS, ROWS, self.outputs))
        self.seed = int(rng.integers(10**6))

    def __repr__(self):
        return str({name: value for name, value in vars(self).items() if name not in ("x", "targets", "make")})

    def build(self):
        first = nn.Linear(self.inputs, self.hidden, dtype=np.float64, rng=self.seed)
        return nn.Sequential(
            first, nn.GELU(), nn.Linear(self.hidden, self.outputs, dtype=np.float64, rng=self.seed + 1)
        )

    def optimizer(self, net):
        optimizer = self.make(net)
        optimizer.follow(optim.WarmUpSchedule(2, optim.CosineSchedule(6), start=0.1))
        return optimizer

    def step(self, model, optimizer, k, part=slice(None)):
        y, pullback = model.vjp(self.x[k][part])
        pullback(nn.mse_loss(y, self.targets[k][part])[1])
        if self.norm_type is not None:
            optim.clip_grad_norm(model, 0.2, self.norm_type)
        optimizer.step()
        model.zero_grad()

    def serial(self):
        net = self.build()
        optimizer = self.optimizer(net)
        for k in range(STEPS):
            self.step(net, optimizer, k)
        return net.full_optimizer_state_dict(optimizer) | net.state_dict()

    def distributed(self, group):
        mesh = DeviceMesh((self.tp, self.dp), ("tp", "dp"), group)
        model = self.build()
        optimizer = self.optimizer(model)
        part = slice(None)
        for k in range(STEPS):
            if k == self.wrap_at:
                model = parallelize(model, mesh["tp"], PLAN if self.tp > 1 else {})
                model = FSDP(model, mesh["dp"], sharding=self.sharding)
                part = slice(mesh["dp"].rank, None, self.dp)
            if k == self.reload_at:
                state = model.full_optimizer_state_dict(optimizer)
                optimizer = self.optimizer(model)
                model.load_full_optimizer_state_dict(optimizer, state)
            self.step(model, optimizer, k, part)
        whole = model.state_dict() if self.tp == 1 else {}
        return model.full_optimizer_state_dict(optimizer) | whole


@pytest.mark.parametrize("seed", range(RUNS))
def test_random_trainings_equal_one_process(seed):
    training = RandomTraining(seed)
    expected = training.serial()
    for found in ferro.simulate(training.distributed, training.tp * training.dp, timeout_s=20):
        assert found.keys() <= expected.keys()
        for name, array in found.items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-8, atol=1e-9, err_msg=f"{name} of {training}")
