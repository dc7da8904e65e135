"""The backward pass of DDP: when buckets are sent, what is accumulated, what is missing."""

import threading

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, hooks
from ferro_strategies.nn import Linear, Module, Parameter, ReLU, Sequential

TINY = {"bucket_bytes": 8, "first_bucket_bytes": 8}  # a bucket for each parameter


def simulate(function, world_size, **options):
    return ferro.simulate(function, world_size, timeout_s=10, run_timeout_s=30, **options)


class Scale(Module):
    """y = factor * x, one number."""

    def __init__(self):
        self.factor = Parameter(np.ones(1))

    def vjp(self, x):
        factor = self.factor.use()

        def pullback(grad):
            factor.add_grad(np.array([(grad * x).sum()]))
            return grad * factor.data

        return x * factor.data, pullback


class Switch(Module):
    """Runs those branches that `chosen` names, and adds their outputs."""

    def __init__(self, count=3):
        self.branches = [Scale() for _ in range(count)]
        self.chosen = list(range(count))

    def vjp(self, x):
        runs = [self.branches[index].vjp(x) for index in self.chosen]

        def pullback(grad):
            for _, pull in reversed(runs):
                pull(grad)

        return sum((y for y, _ in runs), np.zeros_like(x)), pullback


def backward(model, value=1.0):
    y, pullback = model.vjp(np.array([value]))
    pullback(np.ones_like(y))


def grads(model):
    return [None if item.grad is None else float(item.grad[0]) for item in model.parameters()]


# -- overlap ---------------------------------------------------------------------------------------


class Started:
    """An observer that says when as many reductions have been carried out on all ranks."""

    def __init__(self, target):
        self.reached = threading.Event()
        self._left = target
        self._lock = threading.Lock()

    def started(self, event):
        pass

    def finished(self, event):
        with self._lock:
            self._left -= event.op == "all_reduce"
            if self._left == 0:
                self.reached.set()

    def close(self):
        pass


def test_the_first_bucket_is_reduced_before_the_last_gradient_is_computed():
    observer = Started(target=2)

    class Waits(Module):
        """Its pullback ends only when all ranks have reduced a bucket."""

        def vjp(self, x):
            def pullback(grad):
                assert observer.reached.wait(5), "no bucket was reduced during the backward pass"
                return grad

            return x, pullback

    def run(group):
        model = DDP(Sequential(Scale(), Waits(), Scale()), group, **TINY)
        backward(model, 1.0 + group.rank)
        return grads(model)

    assert simulate(run, 2, observers=[observer]) == [[1.5, 1.5]] * 2


def test_every_step_sends_buckets_as_they_are_complete():
    def run(group):
        sent, early = [], []

        def spy(bucket, group):
            sent.append(bucket.index)
            return hooks.mean(bucket, group)

        model = DDP(Switch(3), group, hook=spy, **TINY)
        model.module.branches[1].factor.on_complete(lambda _: early.append(tuple(sent)))
        for _ in range(2):
            backward(model)
            model.zero_grad()
        return early

    assert simulate(run, 2) == [[(0, 1), (0, 1, 2, 0, 1)]] * 2


def test_buckets_are_sent_in_one_order_whatever_order_gradients_come_in():
    def run(group):
        sent = []

        def spy(bucket, group):
            sent.append(bucket.names)
            return hooks.mean(bucket, group)

        model = DDP(Switch(4), group, hook=spy, **TINY)
        model.module.chosen = np.random.default_rng(group.rank).permutation(4).tolist()
        backward(model, group.rank)
        assert sent == [(f"branches.{index}.factor",) for index in (3, 2, 1, 0)]
        return grads(model)

    assert simulate(run, 4) == [[1.5] * 4] * 4


def test_a_hook_sees_complete_gradients_and_one_buffer():
    def run(group):
        def check(bucket, group):
            assert bucket.index == 0
            assert bucket.names == ("bias", "weight")
            assert [grad.shape for grad in bucket.grads] == [(2,), (3, 2)]
            assert bucket.buffer.shape == (8,)
            assert all(np.shares_memory(grad, bucket.buffer) for grad in bucket.grads)
            np.testing.assert_array_equal(bucket.grads[0], np.ones(2))
            return hooks.mean(bucket, group)

        model = DDP(Linear(3, 2), group, hook=check)
        y, pullback = model.vjp(np.ones((1, 3), np.float32))
        pullback(np.ones_like(y))

    simulate(run, 2)


# -- accumulation ----------------------------------------------------------------------------------


class Counter:
    """Counts reductions, through a hook."""

    def __init__(self):
        self.calls = 0

    def __call__(self, bucket, group):
        self.calls += 1
        return hooks.mean(bucket, group)


def test_no_sync_accumulates_and_the_next_step_reduces_the_sum():
    def run(group):
        counter = Counter()
        model = DDP(Scale(), group, hook=counter)
        with model.no_sync():
            backward(model, 1.0 + group.rank)
            backward(model, 10.0 + group.rank)
        assert counter.calls == 0
        assert grads(model) == [11.0 + 2 * group.rank]
        backward(model, 100.0 + group.rank)
        assert counter.calls == 1
        return grads(model)

    assert simulate(run, 2) == [[112.5]] * 2


def test_sync_gradients_reduces_what_no_sync_has_accumulated():
    def run(group):
        counter = Counter()
        model = DDP(Scale(), group, hook=counter)
        with model.no_sync():
            backward(model, 1.0 + group.rank)
            backward(model, 10.0 + group.rank)
        model.sync_gradients()
        assert counter.calls == 1
        return grads(model)

    assert simulate(run, 2) == [[12.0]] * 2


def test_sync_gradients_names_what_has_no_gradient():
    def run(group):
        with pytest.raises(ferro.UsageError, match="rank 0: factor; rank 1: factor"):
            DDP(Scale(), group).sync_gradients()

    simulate(run, 2)


def test_no_sync_ends_with_its_block_also_by_an_error():
    def run(group):
        model = DDP(Scale(), group)
        with pytest.raises(KeyError), model.no_sync(), model.no_sync():
            raise KeyError
        backward(model, group.rank)
        return grads(model)

    assert simulate(run, 2) == [[0.5]] * 2


@pytest.mark.parametrize("accumulate", [0, 2])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_microbatches_in_flight_are_reduced_once_in_the_last_pullback(accumulate, order):
    def run(group):
        counter = Counter()
        model = DDP(Switch(2), group, hook=counter, **TINY)
        pullbacks = []
        for index in range(3):
            x = np.array([10.0**index * (1 + group.rank)])
            if index < accumulate:
                with model.no_sync():
                    pullbacks.append(model.vjp(x)[1])
            else:
                pullbacks.append(model.vjp(x)[1])
        for step, index in enumerate(order):
            assert counter.calls == 0, f"reduced before pullback {step}"
            pullbacks[index](np.ones(1))
        assert counter.calls == 2
        return grads(model)

    assert simulate(run, 2) == [[166.5, 166.5]] * 2


def test_pullbacks_without_zero_grad_add_up_means():
    def run(group):
        model = DDP(Scale(), group)
        backward(model, 1.0 + group.rank)
        backward(model, 10.0 + 5 * group.rank)
        return grads(model)

    assert simulate(run, 2) == [[14.0]] * 2


def test_a_pullback_dropped_without_being_run_is_forgotten():
    def run(group):
        counter = Counter()
        model = DDP(Scale(), group, hook=counter)
        model.vjp(np.ones(1))
        with model.no_sync():
            backward(model)
        assert counter.calls == 0
        backward(model)
        assert counter.calls == 1

    simulate(run, 2)


def test_a_pullback_kept_without_being_run_is_refused_at_the_next_step():
    def run(group):
        model = DDP(Scale(), group)
        kept = model.vjp(np.ones(1))
        backward(model)
        with pytest.raises(ferro.UsageError, match=r"1 pullback\(s\) made earlier"):
            model.vjp(np.ones(1))
        assert kept

    simulate(run, 2)


def test_a_pullback_runs_once_and_frees_its_activations():
    def run(group):
        model = DDP(Sequential(Scale()), group)
        y, pullback = model.vjp(np.ones(1))
        pullback(y)
        with pytest.raises(ferro.UsageError, match="has been run"):
            pullback(y)
        backward(model)

    simulate(run, 1)


def test_a_gradient_that_grows_after_it_was_sent_is_refused():
    class Unannounced(Module):
        def __init__(self):
            self.factor = Parameter(np.ones(1))

        def vjp(self, x):
            def pullback(grad):
                self.factor.add_grad(grad)
                self.factor.add_grad(grad)
                return grad

            return x, pullback

    def run(group):
        model = DDP(Unannounced(), group)
        with pytest.raises(ferro.UsageError, match=r"'factor' grew .* Parameter\.use"):
            backward(model)
        with pytest.raises(ferro.UsageError, match="earlier backward pass failed"):
            model.vjp(np.ones(1))

    simulate(run, 2)


def test_a_rank_that_fails_in_its_backward_pass_does_not_leave_the_others_waiting():
    class Breaks(ReLU):
        def vjp(self, x):
            y, pull = super().vjp(x)

            def pullback(grad):
                if threading.current_thread().name == "rank 1":
                    raise ZeroDivisionError("on rank 1")
                return pull(grad)

            return y, pullback

    ended = set()

    def run(group):
        model = DDP(Sequential(Scale(), Breaks(), Scale()), group, **TINY)
        try:
            backward(model)
        except (ferro.PeerLost, ferro.GroupClosed):  # by how far the reduction had come
            ended.add(group.rank)
            raise

    with pytest.raises(ZeroDivisionError, match="on rank 1"):
        simulate(run, 3)
    assert ended == {0, 2}


def test_a_lost_rank_is_named_also_when_later_buckets_are_refused():
    """The group dies of the first bucket; the second is not even begun."""
    died = threading.Event()

    class Sees:
        def started(self, event):
            pass

        def finished(self, event):
            if event.error:
                died.set()

        def close(self):
            pass

    class Waits(Module):
        def vjp(self, x):
            def pullback(grad):
                assert died.wait(5), "the first bucket was not sent"
                return grad

            return x, pullback

    def run(group):
        model = DDP(Sequential(Scale(), Waits(), Scale()), group, **TINY)
        if group.rank == 0:
            with pytest.raises(ferro.PeerLost, match="rank 1"):
                backward(model)

    simulate(run, 2, observers=[Sees()])


# -- unused parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [None, hooks.mean], ids=["exact", "hook"])
@pytest.mark.parametrize("left_out", [(0,), (0, 2), (0, 1, 2)], ids=str)
def test_unused_parameters_are_named_on_every_rank(hook, left_out):
    def run(group):
        model = DDP(Switch(3), group, hook=hook, **TINY)
        if group.rank in left_out:
            model.module.chosen = [0, 2] if group.rank else [0]
        y, pullback = model.vjp(np.ones(1))
        with pytest.raises(ferro.UsageError) as caught:
            pullback(y)
        # The group is still good, and so is the model.
        model.zero_grad()
        model.module.chosen = [0, 1, 2]
        backward(model, group.rank)
        return str(caught.value), grads(model)

    results = simulate(run, 3)
    assert len({message for message, _ in results}) == 1
    message = results[0][0]
    for rank in range(3):
        missing = "branches.1.factor, branches.2.factor" if rank == 0 else "branches.1.factor"
        assert (f"rank {rank}: {missing}" in message) == (rank in left_out)
    assert "find_unused=True" in message
    assert all(values == [1.0, 1.0, 1.0] for _, values in results)


@pytest.mark.parametrize("hook", [None, hooks.mean], ids=["exact", "hook"])
def test_find_unused_averages_over_ranks_with_zeros(hook):
    def run(group):
        model = DDP(Switch(4), group, find_unused=True, hook=hook, **TINY)
        model.module.chosen = [[0, 1], [1, 2], []][group.rank]
        backward(model, 3.0 * (1 + group.rank))
        once = grads(model)
        model.zero_grad()
        model.module.chosen = [3]
        backward(model, 1.0)
        return once, grads(model)

    expected = [1.0, 3.0, 2.0, None], [None, None, None, 1.0]
    assert simulate(run, 3) == [expected] * 3


def test_find_unused_sends_early_what_does_not_wait_for_unused_parameters():
    def run(group):
        sent, at_first_gradient = [], []

        def spy(bucket, group):
            sent.append(bucket.index)
            return hooks.mean(bucket, group)

        model = DDP(Switch(3), group, find_unused=True, hook=spy, **TINY)
        model.module.chosen = [0, 1]  # branch 2 has the first bucket
        model.module.branches[1].factor.on_complete(lambda _: at_first_gradient.extend(sent))
        y, pullback = model.vjp(np.ones(1))
        assert sent == []
        pullback(y)
        return at_first_gradient, sent

    assert simulate(run, 2) == [([0, 1], [0, 1, 2])] * 2


def test_find_unused_keeps_what_was_accumulated():
    def run(group):
        model = DDP(Switch(2), group, find_unused=True, **TINY)
        with model.no_sync():
            backward(model, 1.0 + group.rank)
        model.module.chosen = [1]
        backward(model, 10.0)
        return grads(model)

    assert simulate(run, 2) == [[1.5, 11.5]] * 2


def test_a_parameter_used_only_while_accumulating_is_not_unused():
    def run(group):
        model = DDP(Switch(2), group, **TINY)
        with model.no_sync():
            backward(model, 1.0 + group.rank)
        model.module.chosen = [1]
        backward(model, 10.0)
        return grads(model)

    assert simulate(run, 2) == [[1.5, 11.5]] * 2
