"""The backward pass of DDP: when buckets are sent, and what is accumulated."""

import threading

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, hooks
from ferro_strategies.nn import Linear, Module, Parameter, ReLU, Sequential

from .models import TINY, Scale, Switch, backward, grads, simulate

# -- overlap ---------------------------------------------------------------------------------------


class Started:
    """An observer that sets `reached` when all ranks together have ended `target` reductions."""

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
        """Wait in the pullback until all ranks have reduced a bucket."""

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
    """A hook that counts reductions."""

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
        except (ferro.PeerLost, ferro.GroupClosed):  # which one depends on timing
            ended.add(group.rank)
            raise

    with pytest.raises(ZeroDivisionError, match="on rank 1"):
        simulate(run, 3)
    assert ended == {0, 2}


def test_a_lost_rank_is_named_also_when_later_buckets_are_refused():
    """The first bucket fails and closes the group; the second is not started."""
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
