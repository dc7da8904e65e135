"""How and when a pipeline's messages are sent and received."""

import threading
import time

import numpy as np
import pytest

import ferro
from ferro_strategies.nn import Linear, Module, mse_loss
from ferro_strategies.pipeline import Kind, Pipeline, build
from ferro_strategies.pipeline.execution.channel import StageChannel
from ferro_strategies.pipeline.execution.header import HEADER_BYTES
from ferro_strategies.pipeline.execution.plan import FORWARD, STEP, Edge, PipelineCall, edges, make_plan
from ferro_strategies.pipeline.execution.transfers import PassStopped, StageReceiver, StageSender

from .pipeline_models import simulate

EDGE = Edge(kind=Kind.FORWARD, stage=1, source=0, target=1, order=(2, 0, 1))
CALL = PipelineCall(STEP, 3)


def exchange(sending, receiving):
    """Run one function with a StageSender on rank 0, one with a StageReceiver on rank 1."""

    def run(group):
        if group.rank == 0:
            sender = StageSender(EDGE, StageChannel(group, "world"), CALL)
            sending(sender)
            sender.finish()
            return None
        return receiving(StageReceiver(EDGE, StageChannel(group, "world"), CALL))

    return simulate(run, 2)[1]


def test_arrays_are_taken_in_any_order_and_may_be_reused_once_sent():
    arrays = {0: np.arange(3), 1: np.zeros((0, 2), np.float32), 2: np.full((2, 2), 2.0)}

    def send(sender):
        for microbatch in EDGE.order:
            sender.send(microbatch, arrays[microbatch].copy())

    taken = exchange(send, lambda receiver: [receiver.recv(m) for m in (0, 1, 2)])
    for microbatch, array in enumerate(taken):
        np.testing.assert_array_equal(array, arrays[microbatch])
        assert array.dtype == arrays[microbatch].dtype


def test_a_sender_that_stops_is_noticed_and_leaves_nothing_behind():
    def send(sender):
        sender.send(2, np.ones(4))
        sender.stop()
        sender.stop()  # once is enough

    def receive(receiver):
        first = receiver.recv(2)
        with pytest.raises(PassStopped, match="rank 0 has stopped"):
            receiver.recv(0)
        receiver.drain()
        return first

    np.testing.assert_array_equal(exchange(send, receive), np.ones(4))


def test_a_receiver_that_drains_takes_what_was_not_asked_for():
    def send(sender):
        for microbatch in EDGE.order:
            sender.send(microbatch, np.ones(100_000))
        sender.stop()  # nothing was left to send, so nothing is said

    assert exchange(send, lambda receiver: receiver.drain()) is None


def test_another_microbatch_than_expected_is_refused():
    def receive(receiver):
        with pytest.raises(ferro.CollectiveMismatch, match="sent microbatch 1 where the inputs of"):
            receiver.recv(2)
        return True

    assert exchange(lambda sender: sender.send(1, np.zeros(0)), receive)


def test_a_sender_in_another_call_is_known_by_its_first_message():
    """And what it sends is taken all the same, however much that is."""

    def run(group):
        channel = StageChannel(group, "pp")
        if group.rank == 0:
            longer = Edge(kind=Kind.FORWARD, stage=1, source=0, target=1, order=tuple(range(5)))
            sender = StageSender(longer, channel, PipelineCall(FORWARD, 5))
            for microbatch in longer.order:
                sender.send(microbatch, np.ones(1000))
            sender.finish()
            return True
        receiver = StageReceiver(EDGE, channel, CALL)
        with pytest.raises(ferro.CollectiveMismatch) as caught:
            receiver.recv(2)
        receiver.drain()
        told = "rank 0 called Pipeline.forward with microbatches=5, rank 1 Pipeline.step with "
        return f"{told}microbatches=3" in str(caught.value), receiver.other_call

    assert simulate(run, 2) == [True, (True, PipelineCall(FORWARD, 5))]


class Sizes:
    """An observer that notes the size of each message sent on rank 0."""

    def __init__(self):
        self.sent = []

    def started(self, event):
        if (event.op, event.global_rank) == ("send", 0):
            self.sent.append(event.nbytes)

    def finished(self, event):
        pass


def test_once_its_size_is_known_an_array_is_one_message():
    watch = Sizes()

    def run(group):
        stage = Linear(2, 2, dtype=np.float64, rng=group.rank)
        pipeline = Pipeline([stage], group, microbatches=3)
        for rows in (7, 7, 9):  # cut into 3 2 2, 3 2 2, 3 3 3
            x = np.ones((rows, 2))
            pipeline.step(x, x, mse_loss)

    ferro.simulate(run, 2, timeout_s=10, run_timeout_s=30, observers=[watch])
    assert watch.sent == [HEADER_BYTES, 48, *[HEADER_BYTES + 48] * 8]


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1"])
def test_receives_start_before_they_are_needed_and_not_long_before(name):
    schedule = build(name, ranks=3, stages_per_rank=2, microbatches=5)
    for rank in range(3):
        plan = make_plan(schedule, rank, STEP)
        remote = {edge.key for edge in plan.incoming}
        due = {a: p for p, a in enumerate(plan.actions) if (a.kind, a.stage) in remote}
        started = {a: p for p, actions in enumerate(plan.receives) for a in actions}
        assert started.keys() == due.keys()
        assert all(due[action] - 2 <= started[action] <= due[action] for action in due)
        assert sum(started[action] < due[action] for action in due) >= len(due) - 1


def test_there_is_an_edge_for_each_boundary_between_ranks_and_direction():
    schedule = build("1f1b", ranks=2, stages_per_rank=2, microbatches=2)
    found = {(str(edge), edge.source, edge.target, edge.order) for edge in edges(schedule)}
    assert {item[:3] for item in found} == {
        ("inputs of stage 1", 0, 1),
        ("inputs of stage 2", 1, 0),
        ("inputs of stage 3", 0, 1),
        ("output gradients of stage 0", 1, 0),
        ("output gradients of stage 1", 0, 1),
        ("output gradients of stage 2", 1, 0),
    }
    assert {item[3] for item in found} == {(0, 1)}
    alone = build("1f1b", ranks=1, stages_per_rank=4, microbatches=2)
    assert edges(alone) == ()


class Watch:
    """An observer that waits for its moment: so many receives begun on rank 1."""

    def __init__(self, receives):
        self._left = receives
        self.come = threading.Event()

    def started(self, event):
        if (event.op, event.global_rank) == ("recv", 1):
            self._left -= 1
            if self._left == 0:
                self.come.set()

    def finished(self, event):
        pass


class Waiting(Module):
    """Computes, the first time, until something has come to pass elsewhere."""

    def __init__(self, event):
        self._event = event

    def vjp(self, x):
        assert self._event.wait(5.0)
        return x, lambda grad: grad


class Telling(Module):
    """Tells when it has been run so many times."""

    def __init__(self, times, event):
        self._left = times
        self._event = event

    def vjp(self, x):
        self._left -= 1
        if self._left == 0:
            self._event.set()
        return x, lambda grad: grad


def gpipe(stages, observers=()):
    """Three microbatches through two stages on two ranks."""

    def run(group):
        pipeline = Pipeline([stages[group.rank]], group, schedule="gpipe", microbatches=3)
        x = np.zeros((3, 2))
        return pipeline.step(x, x, lambda y, t: (0.0, np.zeros_like(y)))

    results = ferro.simulate(run, 2, timeout_s=10, run_timeout_s=30, observers=observers)
    assert results == [0.0, 0.0]


def test_the_next_receive_is_under_way_while_a_stage_computes():
    watch = Watch(receives=3)  # header and array of the first input, header of the second
    gpipe([Linear(2, 2, dtype=np.float64), Waiting(watch.come)], [watch])


def test_a_rank_goes_on_before_what_it_sent_is_used():
    done = threading.Event()
    gpipe([Telling(3, done), Waiting(done)])


def test_a_rank_is_busy_while_it_computes_and_not_while_it_waits(monkeypatch):
    """Time that only passes where it is told to: in stages, in the loss, and on the way."""
    clocks = threading.local()
    monkeypatch.setattr(time, "perf_counter", lambda: getattr(clocks, "now", 0.0))

    def pass_time(seconds):
        clocks.now = time.perf_counter() + seconds

    class Slow(Module):
        def vjp(self, x):
            pass_time(1.0)

            def pullback(grad):
                pass_time(2.0)
                return grad

            return x, pullback

    def loss(y, targets):
        pass_time(0.5)
        return mse_loss(y, targets)

    def slow(function):
        def called(*args, **kwargs):
            pass_time(100.0)
            return function(*args, **kwargs)

        return called

    monkeypatch.setattr(StageReceiver, "recv", slow(StageReceiver.recv))
    monkeypatch.setattr(StageSender, "send", slow(StageSender.send))

    def run(group):
        pipeline = Pipeline([Slow()], group, microbatches=4)
        for _ in range(2):
            pipeline.step(np.ones((4, 1)), np.zeros((4, 1)), loss)
        return pipeline.busy_s

    assert simulate(run, 2) == [12.0, 14.0]
