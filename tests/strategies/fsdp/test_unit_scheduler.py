"""The unit scheduler communicates while units compute, in the order that its table shows."""

import threading

import numpy as np
import pytest

from ferro_strategies.fsdp import ShardingStrategy
from ferro_strategies.nn import Checkpoint, Linear, Module, Sequential

from .models import shard, simulate

pytestmark = pytest.mark.usefixtures("both_ways")


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
            return self._change.wait_for(lambda: self.count(op) >= count, timeout=5)

    def count(self, op):
        return self._ended.count(op)


class Waits(Module):
    """A layer that waits in its passes for numbers of ended operations, by name: `forward` and `backward`."""

    def __init__(self, calls):
        self.inner = Linear(2, 2, dtype=np.float64, rng=0)
        self.calls = calls
        self.forward, self.backward = {}, {}

    def vjp(self, x):
        self.wait(self.forward)
        y, pull = self.inner.vjp(x)

        def pullback(grad):
            self.wait(self.backward)
            return pull(grad)

        return y, pullback

    def wait(self, awaited):
        for op, count in awaited.items():
            assert self.calls.wait_for(op, count), f"no {op} while a unit computed"


@pytest.mark.parametrize("sharding", ["full_shard", "hybrid_shard"])
def test_the_next_unit_is_gathered_and_the_last_reduced_while_one_computes(sharding):
    calls, ranks = Calls(), 2

    def run(group):
        layers = [Waits(calls) for _ in range(3)]
        model = shard(group, Sequential(*layers), sharding=ShardingStrategy(sharding))
        group.barrier()
        before = group.broadcast_object(calls.count("all_gather") if group.rank == 0 else 0)
        # Counted over both ranks. During the forward pass of one unit the next one must be gathered.
        a, b, _ = layers
        a.forward = {"all_gather": before + 2 * ranks}
        b.forward = {"all_gather": before + 3 * ranks}
        # B and C stay, so A is the next that is gathered, behind the reduction of C.
        b.backward = {"reduce_scatter": ranks, "all_gather": before + 4 * ranks}
        a.backward = {"reduce_scatter": 2 * ranks}
        y, pullback = model.vjp(np.ones((1, 2)))
        pullback(y)

    simulate(run, ranks, observers=[calls])


def operations(group, calls, model, *, steps=2):
    """List the operations of a model's passes, step by step; on one rank."""
    group.barrier()
    found = []
    for _ in range(steps):
        begin = len(calls.started_ops)
        y, pullback = model.vjp(np.ones((1, 1)))
        pullback(y)
        *started, agreement = calls.started_ops[begin:]
        assert agreement == "all_reduce"
        found.append([{"all_gather": "g", "reduce_scatter": "r"}[op] for op in started])
    return ["".join(ops) for ops in found]


def layers(count):
    return [Linear(1, 1, dtype=np.float64) for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "backward"),
    [({}, "rgrgrr"), ({"prefetch": False}, "rgrgrgr"), ({"sharding": ShardingStrategy.SHARD_GRAD_OP}, "rrrr")],
)
def test_the_order_of_operations(options, backward):
    """The order is that of the table in `unit_scheduler`, in the first pass as in later ones."""
    calls = Calls()

    def run(group):
        model = shard(group, Sequential(*layers(4)), **options)
        return operations(group, calls, model)

    (found,) = simulate(run, 1, observers=[calls])
    assert found == ["gggg" + backward] * 2


def test_units_inside_checkpoint_are_gathered_again_and_ahead():
    """They do not stay until the backward pass; the scheduler learns that from the first pullback."""
    calls = Calls()

    def run(group):
        inner = layers(4)
        model = Sequential(*map(Checkpoint, inner))
        return operations(group, calls, shard(group, model, units=inner))

    (found,) = simulate(run, 1, observers=[calls])
    assert found == ["gggg" + "grggrgrr", "gggg" + "ggrgrgrr"]


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
