"""Memory of FSDP, counted in bytes allocated: shards and a few units.

NumPy reports its allocations to tracemalloc, so these are exact counts of bytes, not timings.
"""

import gc
import tracemalloc

import numpy as np
import pytest

import ferro
from ferro_strategies.fsdp import FSDP, ShardingStrategy
from ferro_strategies.fsdp.config import make_config
from ferro_strategies.fsdp.flat_parameter_group import shard_module
from ferro_strategies.nn import Linear, Sequential
from ferro_strategies.optim import SGD

DEPTH, WIDTH = 12, 512
UNIT = WIDTH * WIDTH * 4
MESSAGES = 1.5  # units on each rank, in what simulated ranks send each other
SLACK = 0.15  # units on each rank, for objects that are small


def build():
    return Sequential(*(Linear(WIDTH, WIDTH, bias=False, rng=0) for _ in range(DEPTH)))


def step(model, optimizer):
    y, pullback = model.vjp(np.ones((1, WIDTH), np.float32))
    pullback(y)
    optimizer.step()
    optimizer.zero_grad()


def warm_up(group):
    """Make the passes once, so that imports and caches are not counted."""
    model = FSDP(Sequential(Linear(WIDTH, 1, rng=0)), group)
    step(model, SGD(model.parameters(), lr=0.0))


@pytest.fixture
def traced():
    gc.collect()
    tracemalloc.start()
    yield
    tracemalloc.stop()


class Peak:
    """By how much memory rose above the start, and by how much it has risen at the end.

    Of all ranks together, for they are threads: rank 0 measures, between barriers.
    """

    def __init__(self, group):
        self._group = group

    def __enter__(self):
        self._group.barrier()
        if self._group.rank == 0:
            self._before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
        self._group.barrier()
        return self

    def __exit__(self, *_):
        self._group.barrier()
        if self._group.rank == 0:
            now, peak = tracemalloc.get_traced_memory()
            self.rise, self.kept = (peak - self._before) / UNIT, (now - self._before) / UNIT
        self._group.barrier()


def measure(ranks, **options):
    """In units, of all ranks: (making: rise, kept), (training: rise, kept), (evaluating: rise)."""

    def run(group):
        warm_up(group)
        model = build()
        with Peak(group) as making:
            model = FSDP(model, group, **options)
        optimizer = SGD(model.parameters(), lr=0.0)
        with Peak(group) as training:
            for _ in range(2):
                step(model, optimizer)
        with Peak(group) as evaluating:
            model(np.ones((1, WIDTH), np.float32))
        return making, training, evaluating

    return ferro.simulate(run, ranks, timeout_s=10)[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.usefixtures("traced")
def test_full_shard_holds_shards_and_a_few_units(ranks):
    making, training, evaluating = measure(ranks)
    # Whole models become shards, through the memory of one unit on rank 0.
    assert making.kept == pytest.approx((1 - ranks) * DEPTH + 1, abs=SLACK * ranks)
    assert making.rise <= 1 + ranks * MESSAGES
    # Shards of the gradients stay, and the memory of three units: two of parameters, and one that
    # gradients are computed in. The next unit comes to where gradients have been sent from.
    held = DEPTH + ranks * 3
    assert training.kept <= held + SLACK * ranks
    assert training.rise <= held + ranks * MESSAGES
    assert evaluating.rise <= ranks * MESSAGES


@pytest.mark.usefixtures("traced")
def test_without_prefetching_there_is_one_unit_less():
    _, ahead, _ = measure(2)
    _, not_ahead, _ = measure(2, prefetch=False)
    assert not_ahead.kept <= ahead.kept - 2 + 2 * SLACK


@pytest.mark.parametrize(
    ("options", "units"),
    [
        ({"sharding": ShardingStrategy.SHARD_GRAD_OP}, DEPTH),
        ({"sharding": ShardingStrategy.FULL_SHARD}, 2 + 2),
        ({"sharding": ShardingStrategy.FULL_SHARD, "prefetch": False}, 1 + 1),
    ],
)
@pytest.mark.usefixtures("traced")
def test_pullbacks_hold_what_is_to_stay_and_dropped_ones_nothing(options, units):
    def run(group):
        warm_up(group)
        model = FSDP(build(), group, **options)
        x = np.ones((1, WIDTH), np.float32)
        with Peak(group) as held:
            kept = [model.vjp(x) for _ in range(3)]
        assert len(kept) == 3
        del kept
        with Peak(group) as again:
            model.vjp(x)
        return held, again

    held, again = ferro.simulate(run, 2, timeout_s=10)[0]
    # However many microbatches are in flight, each rank holds each unit once: all units, or those
    # that stay and those that compute in turn. Making the model has left the memory of one.
    assert held.kept == pytest.approx(2 * units - 1, abs=4 * SLACK)
    assert again.rise <= 2 * MESSAGES


@pytest.mark.parametrize("waited", [False, True])
def test_memory_of_a_gather_that_may_still_write_is_not_lent_again(waited):
    def run(group):
        config = make_config(
            group, sharding=ShardingStrategy.FULL_SHARD, replicas=None, precision=None, prefetch=True, offload=False
        )
        model = Linear(4, 4, bias=False, rng=0)
        (unit,) = shard_module(model, {}, config).values()
        unsharded = unit.unshard()
        if waited:
            unsharded.wait()
        unsharded.use_unsharded(backward=False)
        memory = model.weight.data
        unsharded.use_shards()
        del unsharded
        again = config.pool.allocate(np, 16, np.dtype(np.float32))
        return np.may_share_memory(memory, again.array)

    assert ferro.simulate(run, 2, timeout_s=10) == [waited] * 2
