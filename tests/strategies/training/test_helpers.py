"""Helpers of training loops: what each does on several ranks, and what it says when something is wrong."""

import io
import logging
import os
import signal
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest

import ferro
from ferro import UsageError
from ferro_strategies import ContextParallel, DeviceMesh, ExpertParallel, ShardedSampler, SyncBatchNorm, nn, seed_all
from ferro_strategies.data import DataLoader
from ferro_strategies.generators import separate_generators
from ferro_strategies.training import (
    AveragedMetrics,
    EarlyStopping,
    Progress,
    StopSignals,
    agree_stop,
    assert_replicas_equal,
    rank_handler,
)


def test_metrics_are_means_over_all_samples_exactly():
    random = np.random.default_rng(0)
    values = random.standard_normal(60) * 10.0 ** random.integers(-9, 9, 60)
    counts = random.integers(1, 50, 60)

    def work(group):
        metrics = AveragedMetrics(group)
        for value, count in list(zip(values, counts, strict=True))[group.rank :: 3]:
            metrics.add(count, loss=value, share=np.float32(0.5))
        if group.rank == 1:
            metrics.add(2, only_here=3.0)
        metrics.add(0, loss=np.nan)  # no samples
        return metrics.compute(), metrics.compute()

    results = ferro.simulate(work, 3)
    assert all(result == results[0] for result in results)
    exact = sum(Fraction(float(v) * float(c)) for v, c in zip(values, counts, strict=True)) / int(counts.sum())
    assert results[0][0] == {"loss": float(exact), "share": 0.5, "only_here": 3.0}
    assert results[0][1] == {}


def test_metrics_of_infinities_and_nan_are_results_like_others():
    def work(group):
        metrics = AveragedMetrics(group)
        metrics.add(1, a=np.inf, b=np.nan, c=1e308, d=(-1) ** group.rank * np.inf)
        metrics.add(1, a=1.0, b=1.0, c=1e308, d=1.0)
        with pytest.raises(UsageError, match="count of samples must be at least 0, not -1"):
            metrics.add(-1, a=1.0)
        return metrics.compute()

    for result in ferro.simulate(work, 2):
        assert str(result) == "{'a': inf, 'b': nan, 'c': 1e+308, 'd': nan}"


def test_all_ranks_stop_if_one_has_a_reason():
    def work(group):
        steps = 0
        while not agree_stop(group, group.rank == 1 and steps == 2, np.False_):
            steps += 1
        return steps

    assert ferro.simulate(work, 3) == [2] * 3


def test_helpers_refuse_other_arguments_than_theirs():
    def work(group):
        stopping, mesh, net = EarlyStopping(patience=1), DeviceMesh((1,), ("dp",), group), nn.Linear(2, 2)
        for always_true in (stopping, stopping.update, lambda: False):
            with pytest.raises(UsageError, match=r"agree_stop: .* is true whatever happens"):
                agree_stop(group, None, always_true)
        for call in (
            lambda: agree_stop(mesh, False),
            lambda: AveragedMetrics(mesh),
            lambda: Progress([], mesh),
            lambda: seed_all(mesh, 0),
            lambda: ShardedSampler(2, mesh),
            lambda: SyncBatchNorm(2, mesh),
        ):
            with pytest.raises(UsageError, match=r"group is a DeviceMesh. Give it what ferro.init"):
                call()
        for strategy in (ContextParallel, ExpertParallel, assert_replicas_equal):
            with pytest.raises(UsageError, match="got a DeviceMesh second"):
                strategy(net, mesh)
            with pytest.raises(UsageError, match="got a ProcessGroup first"):
                strategy(group, net)

    ferro.simulate(work, 1)


def test_a_signal_is_noted_and_the_second_one_ends_the_program():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert stop.received is signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    errors = []

    def enter():
        try:
            StopSignals().__enter__()
        except UsageError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "only the main thread can handle signals" in errors[0]


def test_early_stopping_waits_for_an_improvement():
    stopping = EarlyStopping(2, min_delta=0.1)
    assert [stopping.update(value) for value in (1.0, 0.95, 0.8, np.nan)] == [False, False, False, False]
    resumed = EarlyStopping(2, min_delta=0.1)
    resumed.load_state_dict(stopping.state_dict())
    assert resumed.update(0.75)
    assert resumed.best == 0.8
    best = EarlyStopping(1, mode="max")
    assert [best.update(value) for value in (0.5, 0.6, 0.6)] == [False, False, True]
    with pytest.raises(UsageError, match="patience must be at least 1"):
        EarlyStopping(0)


def test_ranks_log_with_their_rank_and_only_rank_0_in_detail():
    def work(group):
        stream = io.StringIO()
        logger = logging.Logger("training", logging.INFO)
        logger.addHandler(rank_handler(group, stream=stream, format="rank %(rank)d: %(message)s"))
        logger.info("began")
        logger.warning("loss is %s", "nan")
        return stream.getvalue().splitlines()

    assert ferro.simulate(work, 2) == [["rank 0: began", "rank 0: loss is nan"], ["rank 1: loss is nan"]]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_by_rank_0_in_whole_lines():
    def work(group, make_stream=io.StringIO, items=range(4), **options):
        stream = make_stream()
        for item in (steps := Progress(items, group, description="epoch 1", stream=stream, **options)):
            steps.show(loss=1 / 3, step=item)
        return stream.getvalue()

    first, second = ferro.simulate(lambda group: work(group, interval_s=0), 2)
    assert second == ""
    assert [line.split(",")[0] for line in first.splitlines()] == [f"epoch 1: {i}/4" for i in (1, 2, 3, 4)]
    assert first.splitlines()[-1].endswith("/s loss=0.3333 step=3")
    assert ferro.simulate(lambda group: work(group), 1)[0].count("\n") == 1
    unknown = ferro.simulate(lambda group: work(group, items=iter("ab")), 1)[0]
    assert unknown.startswith("epoch 1: 2, ")


def test_progress_on_a_terminal_is_tqdms(monkeypatch):
    pytest.importorskip("tqdm")

    def work(group):
        stream = Terminal()
        for item in (steps := Progress(range(3), group, stream=stream)):
            steps.show(step=item)
        return stream.getvalue()

    assert "3/3" in ferro.simulate(work, 1)[0]
    assert "100%" in ferro.simulate(work, 1)[0]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert ferro.simulate(work, 1)[0].startswith("3/3, ")


def make_net():
    return nn.Sequential(nn.Linear(3, 4, rng=0), nn.BatchNorm(4), nn.Linear(4, 2, rng=1))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_replicas_that_differ_are_named_with_ranks_and_element(dtype):
    def work(group, change):
        net = nn.Sequential(nn.Linear(3, 4, rng=0, dtype=dtype), nn.BatchNorm(4))
        change(net, group.rank)
        try:
            assert_replicas_equal(net, group)
        except AssertionError as error:
            return str(error)
        return ""

    def nothing(net, rank):
        net.layers[0].weight.data[0, 0] = np.nan

    def one_element(net, rank):
        if rank in (1, 2):
            net.layers[0].weight.data[2, 3] = 5
            net.layers[0].weight.data[2, 1] = rank

    def buffer(net, rank):
        net.layers[1].running_mean.data[...] = [0, rank > 0, 1, rank] if rank < 2 else [0, 0, 1, 0]

    assert ferro.simulate(lambda group: work(group, nothing), 4) == [""] * 4
    for text in ferro.simulate(lambda group: work(group, one_element), 4):
        assert "parameter 'layers.0.weight' is not the same on all ranks: rank(s) 1, 2 differ from rank 0" in text
        assert "element (2, 1) is " in text
        assert "on ranks 0, 3, 1.0 on rank 1, 2.0 on rank 2" in text
    for text in ferro.simulate(lambda group: work(group, buffer), 3):
        assert "buffer 'layers.1.running_mean' is not" in text
        assert "element (1,) is 0.0 on ranks 0, 2, 1.0 on rank 1" in text


def test_other_models_are_no_replicas():
    def work(group):
        net = nn.Linear(3, 2 + group.rank, rng=0)
        with pytest.raises(AssertionError, match=r"rank 1 has parameter 'weight' of .* where rank 0 has parameter"):
            assert_replicas_equal(net, group)

    ferro.simulate(work, 2)


def test_one_seed_gives_ranks_the_same_numbers_and_other_ones():
    def work(group):
        generators = seed_all(group, np.int64(5))
        own = np.random.random(), generators.own("dropout").random(), generators.own("noise").random()
        shared = generators.shared("weights").random(), generators.shared("order").random()
        return own, shared

    first, second = ferro.simulate(work, 2)  # ranks are threads, which share the global generators
    assert first[1] == second[1]
    assert len({*first[1], *first[0][1:], *second[0][1:]}) == 6
    alone = ferro.simulate(work, 1)[0]
    assert alone == ferro.simulate(work, 1)[0]
    assert (alone[1], alone[0][1:]) == (first[1], first[0][1:])

    def disagree(group):
        with pytest.raises(UsageError, match=r"rank 1 gave the seed 1, rank 0 gave 0: give the same whole number"):
            seed_all(group, group.rank)
        with pytest.raises(UsageError, match=r"rank 0 gave the seed -1: give the same"):
            seed_all(group, -1)

    ferro.simulate(disagree, 2)


def test_equal_generators_part_by_rank_and_others_stay():
    def work(group):
        net = nn.Sequential(nn.Dropout(rng=3), nn.Dropout(rng=group.rank))
        before = net.generator_state_dict()
        separate_generators(net, group)
        after = net.generator_state_dict()
        assert after["layers.1.rng"] == before["layers.1.rng"]
        separate_generators(net, group)  # they differ now, as behind a loaded state
        assert net.generator_state_dict() == after
        return net.layers[0](np.ones(64)).tolist()

    masks = ferro.simulate(work, 3)
    assert masks[0] == nn.Dropout(rng=3)(np.ones(64)).tolist()
    assert len({tuple(mask) for mask in masks}) == 3


def test_helpers_work_together_in_a_loop():
    def work(group):
        sampler = ShardedSampler(10, group)
        metrics, stopping = AveragedMetrics(group), EarlyStopping(1)
        losses = []
        with DataLoader(np.arange(10.0), sampler, 4) as loader:
            while not agree_stop(group, len(losses) > 0 and stopping.update(losses[-1])):
                for batch in Progress(loader, group, stream=io.StringIO()):
                    metrics.add(len(batch), mean=float(batch.mean()))
                losses.append(metrics.compute()["mean"])
        return losses

    assert ferro.simulate(work, 2) == [[4.5, 4.5]] * 2
