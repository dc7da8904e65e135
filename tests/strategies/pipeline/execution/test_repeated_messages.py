"""Messages through persistent operations: the same results and the same errors as with ordinary ones."""

import threading

import numpy as np
import pytest

import ferro
from ferro.simulated import Fault
from ferro_strategies.nn import Linear, Module, cross_entropy, mse_loss
from ferro_strategies.pipeline import Pipeline
from ferro_strategies.pipeline.execution import repeated_messages

from .pipeline_models import Trap, batch, failing, gradients, make_stages, share, simulate

SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1"]
# A size comes again until it is repeated; others come between, larger and smaller, and one that is only a header.
ROWS = [8, 8, 8, 8, 13, 6, 8, 40, 40, 40, 40, 3, 40, 2, 2, 2, 2, 2]


@pytest.fixture
def repeats(monkeypatch):
    """Repeat messages on the simulated backend, too, where nothing is gained."""
    monkeypatch.setattr(repeated_messages, "_is_better", lambda operation: True)


def make_pipeline(group, schedule, trap=None):
    stages = share(make_stages(6), group)
    if trap is not None and trap[0] == group.rank:
        stages[1] = Trap(stages[1], *trap[1:])
    return Pipeline(stages, group, schedule=schedule, microbatches=4)


class Received:
    """Counts the messages that came through persistent operations."""

    def __init__(self, monkeypatch):
        self.count = 0
        self._lock = threading.Lock()
        self._receive = repeated_messages.RepeatedMessages.receive
        monkeypatch.setattr(repeated_messages.RepeatedMessages, "receive", lambda messages: self(messages))

    def __call__(self, messages):
        with self._lock:
            self.count += 1
        return self._receive(messages)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_results_are_those_of_ordinary_messages_bit_for_bit(schedule, monkeypatch):
    def run(group):
        pipeline = make_pipeline(group, schedule)
        found = []
        for seed, rows in enumerate(ROWS):
            found.append(pipeline.step(*batch(rows, seed), cross_entropy))
            found.append(pipeline.forward(batch(rows)[0], microbatches=1 + seed % 7))
        return found, gradients(pipeline)

    received = Received(monkeypatch)
    expected = simulate(run, 3)
    assert received.count == 0
    monkeypatch.setattr(repeated_messages, "_is_better", lambda operation: True)
    results = simulate(run, 3)
    assert received.count > len(ROWS)
    for (values, grads), (wanted, wanted_grads) in zip(results, expected, strict=True):
        for value, other in zip(values, wanted, strict=True):
            np.testing.assert_array_equal(value, other)
        assert grads.keys() == wanted_grads.keys()
        for name, grad in grads.items():
            np.testing.assert_array_equal(grad, wanted_grads[name], err_msg=name)


def test_an_array_is_not_overwritten_by_later_ones(repeats):
    class Keeping(Module):
        def __init__(self):
            self.seen = []

        def vjp(self, x):
            self.seen.append((x, x.copy()))
            return x, lambda grad: grad

    def run(group):
        stage = Keeping() if group.rank else Linear(2, 2, dtype=np.float64, rng=0)
        pipeline = Pipeline([stage], group, schedule="gpipe", microbatches=6)
        for seed in range(5):
            x = np.random.default_rng(seed).standard_normal((12, 2))
            pipeline.step(x, x, mse_loss)
        return stage

    seen = simulate(run, 2)[1].seen
    assert len(seen) == 30
    for kept, copy in seen:
        np.testing.assert_array_equal(kept, copy)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("half", ["forward", "backward"])
@pytest.mark.parametrize(("rank", "microbatch"), [(0, 0), (2, 3)])
def test_every_rank_learns_what_failed_where(schedule, half, rank, microbatch, repeats):
    def run(group):
        pipeline = make_pipeline(group, schedule, (rank, half, 16 + microbatch))
        for _ in range(4):
            pipeline.step(*batch(8), cross_entropy)
        first = failing(lambda: pipeline.step(*batch(8), cross_entropy))
        return first, int(group.all_reduce(np.array(1)))

    place = f"the {half} pass of stage {rank + 3}, microbatch {microbatch}"
    for own, (error, total) in enumerate(simulate(run, 3)):
        assert total == 3
        if own == rank:
            assert error.__notes__ == [f"(Pipeline.step: on rank {rank}, in {place})"]
        else:
            assert f"failed on rank {rank}, in {place}: KeyError: 'trap'" in str(error)


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved_1f1b"])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("microbatches", [1, 9])
def test_ranks_in_different_calls_learn_so_at_once(schedule, rank, microbatches, repeats):
    def run(group):
        pipeline = make_pipeline(group, schedule)
        for _ in range(4):
            pipeline.step(*batch(12), cross_entropy)
        if group.rank == rank:
            return failing(lambda: pipeline.forward(batch(12)[0], microbatches=microbatches))
        return failing(lambda: pipeline.step(*batch(12), cross_entropy))

    for error in simulate(run, 3):
        assert not isinstance(error, TimeoutError)
        assert "Pipeline.step with microbatches=4" in str(error)
        assert f"Pipeline.forward with microbatches={microbatches}" in str(error)


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("after", [100, 140])
def test_a_rank_that_dies_leaves_nobody_waiting(victim, after, repeats):
    def run(group):
        pipeline = make_pipeline(group, "1f1b")

        def train():
            for _ in range(30):
                pipeline.step(*batch(8), cross_entropy)

        return failing(train)

    faults = [Fault(rank=victim, after=after, kind="kill")]
    errors = ferro.simulate(run, 3, timeout_s=5, run_timeout_s=20, faults=faults)
    for rank, error in enumerate(errors):
        assert isinstance(error, ferro.FerroError) == (rank != victim)
        if isinstance(error, ferro.PeerLost):
            assert (error.group, error.rank, error.peer) == ("world", rank, victim)


def test_an_array_that_cannot_be_packed_is_told_to_the_receiver(repeats):
    class Odd(Module):
        passes = 0

        def vjp(self, x):
            self.passes += 1
            return (np.zeros((1,) * 40) if self.passes == 8 else x), lambda grad: grad

    def run(group):
        pipeline = Pipeline([Odd() if group.rank == 0 else Linear(2, 2, dtype=np.float64)], group, microbatches=2)
        x = np.ones((4, 2))
        for _ in range(3):
            pipeline.step(x, x, mse_loss)
        return failing(lambda: pipeline.step(x, x, mse_loss))

    first, second = simulate(run, 2)
    assert not isinstance(first, ferro.FerroError)
    assert "failed on rank 0, in the forward pass of stage 0, microbatch 1" in str(second)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_cannot_repeat_messages_is_told_to_all_at_once(rank, repeats, monkeypatch):
    make = repeated_messages.make_repeated_messages

    def refuse(*arguments):
        if threading.current_thread() in refusing:
            raise MemoryError("no room")
        return make(*arguments)

    refusing = set()
    monkeypatch.setattr("ferro_strategies.pipeline.execution.channel.make_repeated_messages", refuse)

    def run(group):
        if group.rank == rank:
            refusing.add(threading.current_thread())
        pipeline = make_pipeline(group, "interleaved_1f1b")
        for _ in range(2):
            pipeline.step(*batch(8), cross_entropy)
        return failing(lambda: pipeline.step(*batch(8), cross_entropy))

    for own, error in enumerate(simulate(run, 3)):
        assert isinstance(error, MemoryError) == (own == rank)
        if own != rank:
            assert f"failed on rank {rank}, in preparing the messages between stages: MemoryError" in str(error)


def test_every_rank_learns_which_rank_never_came_to_make_them(repeats):
    over = threading.Barrier(3)

    def run(group):
        pipeline = make_pipeline(group, "1f1b")
        for _ in range(2):
            pipeline.step(*batch(8), cross_entropy)
        error = None if group.rank == 0 else failing(lambda: pipeline.step(*batch(8), cross_entropy))
        over.wait(timeout=20)
        return error

    absent, *errors = ferro.simulate(run, 3, timeout_s=1.5, run_timeout_s=30)
    assert absent is None
    for error in errors:
        assert isinstance(error, ferro.CollectiveTimeout)
        assert error.missing == (0,)
        assert "came as far as preparing the messages between stages" in str(error)
