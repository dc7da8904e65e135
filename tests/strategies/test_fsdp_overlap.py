"""FSDP communicates while it computes: units wait, in their computation, for what comes next."""

import threading

import numpy as np
import pytest

from ferro_strategies.fsdp import ShardingStrategy
from ferro_strategies.nn import Linear, Module, Sequential

from .fsdp_models import shard, simulate


class Calls:
    """An observer that lets modules wait until so many operations of a kind have ended."""

    def __init__(self):
        self.started_ops = []
        self._ended = []
        self._change = threading.Condition()

    def started(self, event):
        with self._change:
            self.started_ops.append(event.op)

    def finished(self, event):
        with self._change:
            self._ended.append(event.op)
            self._change.notify_all()

    def close(self):
        pass

    def wait_for(self, op, count):
        with self._change:
            return self._change.wait_for(lambda: self._ended.count(op) >= count, timeout=5)


class Waits(Module):
    """A layer in whose halves something else must end."""

    def __init__(self, calls, forward, backward):
        self.inner = Linear(2, 2, dtype=np.float64, rng=0)
        self._await = [(calls, *forward), (calls, *backward)]

    def vjp(self, x):
        def wait(half):
            calls, op, count = self._await[half]
            assert calls.wait_for(op, count), f"no {op} while a unit computed"

        wait(0)
        y, pull = self.inner.vjp(x)

        def pullback(grad):
            wait(1)
            return pull(grad)

        return y, pullback


@pytest.mark.parametrize("sharding", ["full_shard", "hybrid_shard"])
def test_the_next_unit_is_gathered_and_the_last_reduced_while_one_computes(sharding):
    calls, ranks = Calls(), 2

    def run(group):
        gathers = "all_gather"
        before = [0]

        def unit(forward, backward):
            return Waits(calls, forward, backward)

        # Gathers are counted over both ranks. First A, B and C go forward, then backward.
        model = Sequential(
            unit((gathers, 0), ("reduce_scatter", 2 * ranks)),
            unit((gathers, 0), ("reduce_scatter", ranks)),
            unit((gathers, 0), (gathers, 0)),
        )
        model = shard(group, model, sharding=ShardingStrategy(sharding))
        group.barrier()
        if group.rank == 0:
            before[0] = calls._ended.count(gathers)
        started = group.broadcast_object(before[0])
        for index, layer in enumerate(model.module.layers):
            (calls_, *_), backward = layer.module._await
            # In the forward half of unit i, unit i + 1 must come; backward, unit i - 1.
            count = started + ranks * min(index + 2, 3)
            if index == 2:
                backward = calls_, gathers, started + ranks * 5
            layer.module._await[:] = [(calls_, gathers, count), backward]
        y, pullback = model.vjp(np.ones((1, 2)))
        pullback(y)

    simulate(run, ranks, observers=[calls])


def test_the_order_of_operations():
    """What the table in `passes` says, and the first pass as the later ones."""
    calls = Calls()

    def run(group):
        model = shard(group, Sequential(*(Linear(1, 1, dtype=np.float64) for _ in range(3))))
        group.barrier()
        begin = len(calls.started_ops)
        for _ in range(2):
            y, pullback = model.vjp(np.ones((1, 1)))
            pullback(y)
        return calls.started_ops[begin:]

    (operations,) = simulate(run, 1, observers=[calls])
    gather, reduce = "all_gather", "reduce_scatter"
    forward = [gather] * 3
    backward = [gather, gather, reduce, gather, reduce, reduce]
    assert operations == 2 * (forward + backward)


def test_units_that_come_in_another_order_are_gathered_all_the_same():
    class Order(Module):
        def __init__(self):
            rng = np.random.default_rng(0)
            self.layers = [Linear(2, 2, dtype=np.float64, rng=rng) for _ in range(4)]
            self.order = [0, 1, 2, 3]

        def vjp(self, x):
            pulls = []
            for index in self.order:
                x, pull = self.layers[index].vjp(x)
                pulls.append(pull)

            def pullback(grad):
                for pull in reversed(pulls):
                    grad = pull(grad)
                return grad

            return x, pullback

    orders = [[0, 1, 2, 3], [3, 1, 0], [2, 2, 1, 3, 0], [0], [1, 0, 1, 0]]

    def outputs(model, inner):
        results = []
        for order in orders:
            inner.order = order
            y, pullback = model.vjp(np.ones((1, 2)))
            results += [y, pullback(np.ones((1, 2)))]
        return results

    def run(group):
        model = shard(group, Order())
        return outputs(model, model.module)

    plain = Order()
    expected = outputs(plain, plain)
    for result in simulate(run, 3):
        np.testing.assert_allclose(result, expected, rtol=1e-12)
