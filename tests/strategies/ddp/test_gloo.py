"""DDP between real processes over gloo: the same parameters as one process, step by step."""

from __future__ import annotations

import numpy as np
import pytest

from ferro.testing import run_ranks
from ferro_strategies import DDP, hooks, nn, optim

BATCH, STEPS = 12, 4


def make_model():
    rng = np.random.default_rng(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, rng=rng, dtype=np.float64),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32, rng=rng, dtype=np.float64),
        nn.LayerNorm(32, dtype=np.float64),
        nn.Residual(nn.Linear(32, 32, rng=rng, dtype=np.float64)),
        nn.Linear(32, 5, rng=rng, dtype=np.float64),
    )


def batches():
    rng = np.random.default_rng(4)
    for _ in range(STEPS):
        yield rng.standard_normal((BATCH, 1, 8, 8)), rng.integers(0, 5, BATCH)


def train(model, rank=0, ranks=1):
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    for x, labels in batches():
        logits, pullback = model.vjp(x[rank::ranks])
        _, grad = nn.cross_entropy(logits, labels[rank::ranks])
        pullback(grad)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.data for name, parameter in model.named_parameters()}


def train_replica(group):
    model = DDP(make_model(), group, bucket_bytes=4096, first_bucket_bytes=512)
    return train(model, group.rank, group.world_size)


def train_compressed(group):
    model = DDP(make_model(), group, hook=hooks.float16, bucket_bytes=4096)
    return train(model, group.rank, group.world_size)


@pytest.mark.parametrize("ranks", [2, 3])
def test_parameters_equal_those_of_one_process(ranks):
    reference = train(make_model())
    for replica in run_ranks(train_replica, ranks, backend="gloo"):
        assert replica.keys() == reference.keys()
        for name, value in reference.items():
            np.testing.assert_allclose(replica[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_compressed_gradients_leave_the_replicas_equal_bit_for_bit():
    first, second = run_ranks(train_compressed, 2, backend="gloo")
    reference = train(make_model())
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
        assert not np.array_equal(value, reference[name]), "nothing was compressed"
