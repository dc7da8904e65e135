"""Which arrays a short path takes, and a short path with its arrays bound."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import numpy as np
import pytest

from ferro_gloo.shm.native import ABSENT, NATIVE
from ferro_testing import run_ranks

from .short_paths import Short

pytestmark = pytest.mark.skipif(NATIVE is None, reason=ABSENT)

FLOAT = np.dtype(np.float32)


def run(function, ranks=2, *args):
    return run_ranks(function, ranks, backend="gloo", timeout_s=60, args=args)


def frozen(size):
    array = np.ones(size, FLOAT)
    array.setflags(write=False)
    return array


def misaligned(size):
    return np.zeros(size * 4 + 1, np.uint8)[1:].view(FLOAT)


def decline(group):
    """Nothing is begun when a call is declined, so that the calls in between still meet."""
    n, state = group.world_size, group._dispatcher._collectives.state
    good, wide = np.ones(4, FLOAT), np.ones(12, FLOAT)
    reduce_all = Short(group, "all_reduce", FLOAT, 4, "sum").path
    gather_all = Short(group, "all_gather", FLOAT, 4).path
    scatter_sums = Short(group, "reduce_scatter", FLOAT, 4 * n, "sum").path
    whole, other = np.ones(4 * n, FLOAT), (group.rank + 1) % n
    declined = [
        (reduce_all, good, frozen(4)),
        (reduce_all, good, np.ones(5, FLOAT)),
        (reduce_all, np.ones(3, FLOAT), good),
        (reduce_all, good, np.ones(8, FLOAT)[::2]),
        (reduce_all, np.ones(8, FLOAT)[::2], good),
        (reduce_all, good, np.ones((2, 4), FLOAT).T),
        (reduce_all, np.asfortranarray(np.ones((2, 2), FLOAT)), good),
        (reduce_all, good, misaligned(4)),
        (reduce_all, wide[0:4], wide[2:6]),
        (reduce_all, wide[4:8], wide[3:7]),
        (reduce_all, good, None),
        (reduce_all, None, good),
        (reduce_all, good, "four"),
        (reduce_all, [1.0] * 4, good),
        (gather_all, whole[4 * other : 4 * other + 4], whole),
        (gather_all, whole[1:5], whole),
        (scatter_sums, whole, whole[4 * group.rank : 4 * group.rank + 4]),
    ]
    for path, source, target in declined:
        before = state[1]
        assert path(source, target) is False, (path, source, target)
        assert path.bind(source, target) is None
        assert state[1] == before
        x = np.full(4, group.rank, FLOAT)
        assert reduce_all(x, x)
        assert x[0] == sum(range(n))
        assert state[1] == before + 1
    own = whole[4 * group.rank : 4 * group.rank + 4]
    own[...] = group.rank
    assert gather_all(own, whole)
    assert whole.tolist() == [float(rank) for rank in range(n) for _ in range(4)]
    assert reduce_all(frozen(4), good)
    assert good[0] == n
    for arguments in [(good,), (good, good, good), ()]:
        with pytest.raises(TypeError):
            reduce_all(*arguments)
    with pytest.raises(TypeError):
        reduce_all(good, good, wait=True)


@pytest.mark.parametrize("ranks", [2, 3])
def test_declines_what_it_cannot_use(ranks):
    run(decline, ranks)


def busy_turns(group):
    """The path declines while a collective is carried out or waits, and when no collective may begin."""
    dispatcher = group._dispatcher
    executor = dispatcher._collectives
    short = Short(group, "all_reduce", FLOAT, 4, "sum")
    x = np.ones(4, FLOAT)
    with executor.lock:
        assert short.path(x, x) is False
    executor.pending.append(None)
    assert short.path(x, x) is False
    executor.pending.clear()
    executor.state[0] += 1
    assert short.path(x, x) is False
    executor.state[0] -= 1
    assert short.path(x, x)
    assert x[0] == group.world_size
    assert not executor.lock.locked()


def test_declines_while_the_turn_is_another_s():
    run(busy_turns)


def bound_calls(group):
    n = group.world_size
    x, out = np.full(6, group.rank, FLOAT), np.empty(6, FLOAT)
    bound = Short(group, "all_reduce", FLOAT, 6, "max").path.bind(x, out)
    for step in range(50):
        x[...] = group.rank + step
        assert bound()
        assert out.tolist() == [n - 1.0 + step] * 6
    lock = group._dispatcher._collectives.lock
    for step in range(50):
        x[...] = group.rank - step
        with lock:
            assert bound.start()
            assert bound.start() is False
            with pytest.raises(RuntimeError, match="must be finished"):
                bound.close()
            while step % 2 and not bound.test():
                pass
            bound.finish()
        assert out.tolist() == [n - 1.0 - step] * 6
        with pytest.raises(RuntimeError, match="not been started"):
            bound.finish()
        with pytest.raises(RuntimeError, match="not been started"):
            bound.test()
    with pytest.raises(TypeError):
        bound(x)
    group.barrier()
    bound.close()
    bound.close()
    assert bound() is False
    assert bound.start() is False


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bound_arrays(ranks):
    run(bound_calls, ranks)


def late_steps(group):
    """A started step is not done before the late rank has started its own, and a late `finish` takes no time."""
    x = np.ones(4, FLOAT)
    bound = Short(group, "all_reduce", FLOAT, 4, "sum").path.bind(x, x)
    lock, store = group._dispatcher._collectives.lock, group._dispatcher._info.store
    with lock:
        if group.rank == 0:
            assert bound.start()
            assert not bound.test()
            store.set("tested", b"1")
            while not bound.test():
                threading.Event().wait(0.001)
        else:
            store.get("tested", deadline=float("inf"))
            assert bound.start()
        bound.finish()
    return float(x[3])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_test_tells_when_the_others_have_come(ranks):
    assert run(late_steps, ranks) == [float(ranks)] * ranks


def held(group):
    """Bound arrays live as long as they are bound; paths that nobody has are collected, in cycles, too."""
    x = np.ones(4, FLOAT)
    gone = weakref.ref(x)
    short = Short(group, "all_reduce", FLOAT, 4, "sum")
    bound = short.path.bind(x, x)
    del x
    gc.collect()
    assert gone() is not None
    assert bound()
    bound.close()
    assert gone() is None

    y = np.ones(4, FLOAT)
    gone = weakref.ref(y)
    cycle = [short.path.bind(y, y)]
    cycle.append(cycle)
    del y, cycle
    gc.collect()
    assert gone() is None

    count = sys.getrefcount(group._dispatcher._collectives.lock)
    for _ in range(100):
        path = Short(group, "all_reduce", FLOAT, 4, "sum").path
        z = np.ones(4, FLOAT)
        assert path(z, z)
        assert path(z, None) is False
    references = sys.getrefcount(z)
    for _ in range(1000):
        assert path(z, z)
        assert path(frozen(4), z)
        assert path.bind(z, None) is None
    assert sys.getrefcount(z) == references
    del path
    assert sys.getrefcount(group._dispatcher._collectives.lock) == count


def test_holds_what_is_bound_and_nothing_else():
    run(held)


def persistent_steps(group):
    """Steps of persistent operations take the short path, in any order with ordinary calls."""
    x, y = np.full(3, group.rank + 1.0), np.zeros(3)
    n = group.world_size
    total, least = group.persistent("all_reduce", x, out=x), group.persistent("all_reduce", x, op="min", out=y)
    state = group._dispatcher._collectives.state
    before = state[1]
    for step in range(30):
        x[...] = group.rank + 1
        least()
        assert y[0] == 1
        total.start()
        if step % 3 == 0:
            assert group.all_reduce(y)[0] == n
        total.wait()
        assert x[0] == n * (n + 1) / 2
    assert state[1] >= before + 60
    group.barrier()
    total.close()
    least.close()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_persistent_operations_take_it(ranks):
    run(persistent_steps, ranks)
