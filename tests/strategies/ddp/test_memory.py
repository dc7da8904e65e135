"""Memory of DDP: parameters, gradients once, and no other array of their size.

NumPy reports its allocations to tracemalloc, so these are exact counts of bytes, not timings.
"""

import tracemalloc

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP
from ferro_strategies.nn import Linear, Sequential
from ferro_strategies.optim import SGD
from ferro_strategies.replicas import broadcast_arrays

BUCKET = 1 << 18


def build(depth=16):
    return Sequential(*(Linear(256, 256, bias=False, rng=0) for _ in range(depth)))


def size_of(model):
    return sum(parameter.data.nbytes for parameter in model.parameters())


def train(model):
    optimizer = SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        y, pullback = model.vjp(np.ones((1, 256), np.float32))
        pullback(y)
        optimizer.step()
        optimizer.zero_grad()


def warm_up(group):
    """Train once, so that imports and caches are not counted."""
    train(DDP(Linear(256, 1, rng=0), group))


class Peak:
    """The rise of memory above the start, at its peak and at the end."""

    def __enter__(self):
        self._before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        return self

    def __exit__(self, *_):
        now, peak = tracemalloc.get_traced_memory()
        self.rise, self.kept = peak - self._before, now - self._before


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.usefixtures("traced")
def test_gradients_are_kept_once_and_nothing_is_copied(world_size):
    def run(group):
        warm_up(group)
        model = build()
        size = size_of(model)
        group.barrier()
        peaks = [Peak() for _ in range(2)]
        if group.rank == 0:
            peaks[0].__enter__()
        group.barrier()
        model = DDP(model, group, bucket_bytes=BUCKET, first_bucket_bytes=BUCKET)
        group.barrier()
        if group.rank == 0:
            peaks[0].__exit__()
            peaks[1].__enter__()
        group.barrier()
        train(model)
        group.barrier()
        if group.rank == 0:
            peaks[1].__exit__()
        return size, peaks

    size, (making, training) = ferro.simulate(run, world_size, timeout_s=10)[0]
    everyones = world_size * size
    # Messages between simulated ranks are copies: at most the bucket under way, on each rank.
    slack = world_size * 2 * BUCKET
    assert everyones <= making.kept < everyones + slack / 4
    assert making.rise < everyones + slack
    assert training.rise < slack < everyones


@pytest.mark.usefixtures("traced")
def test_values_are_broadcast_a_chunk_at_a_time():
    def run(group):
        model = build()
        arrays = [parameter.data[row] for parameter in model.parameters() for row in range(256)]
        arrays.append(np.ones(4 * BUCKET, np.uint8))
        with Peak() as peak:
            broadcast_arrays(group, arrays, 0, BUCKET)
        return size_of(model), peak.rise

    (size, rise) = ferro.simulate(run, 1, timeout_s=10)[0]
    assert rise < 3 * BUCKET < size
