"""DataLoader: the sampler's batches in the sampler's order, whoever makes them; errors, deaths and ends of workers."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import ferro
from ferro import UsageError
from ferro_strategies import ShardedSampler
from ferro_strategies.data import DataLoader, DataWorkerError, item_rng

KINDS = {"no workers": {}, "threads": {"workers": 3}, "processes": {"workers": 2, "processes": True}}


class Squares:
    """Items (index, index squared, a random number); an item of `special` does something else."""

    def __init__(self, length=23, special=None):
        self.length = length
        self.special = special or {}

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.special:
            self.special[index]()
        return {"x": np.array([index, index**2]), "noise": item_rng().random(), "label": index % 2}


def collected(loader):
    return [(batch["x"][:, 0].tolist(), batch["noise"].tolist()) for batch in loader]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_batches_are_those_of_the_sampler_whoever_makes_them(options):
    alone = DataLoader(Squares(), ShardedSampler(23, (1, 2), seed=4), 3)
    with DataLoader(Squares(), ShardedSampler(23, (1, 2), seed=4), 3, **options) as loader:
        wanted = ShardedSampler(23, (1, 2), seed=4)
        for epoch in range(2):  # the loader begins the next epoch by itself
            wanted.set_epoch(epoch)
            assert loader.epoch == epoch
            found = collected(loader)
            assert [rows for rows, _ in found] == [batch.tolist() for batch in wanted.batches(3)]
            assert len(found) == len(loader) == loader.batch_counts()[1]
            assert found == collected(alone)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_an_epoch_goes_on_where_it_was_left_on_any_number_of_ranks(options):
    def load(rank, ranks, state=None, batch=2):
        loader = DataLoader(Squares(20), ShardedSampler(20, (rank, ranks)), batch, **options)
        if state is not None:
            loader.load_state_dict(state)
        return loader

    with load(0, 1, batch=4) as whole:
        expected = collected(whole)
    noise = {row: value for rows, values in expected for row, value in zip(rows, values, strict=True)}
    taken, states = [], []
    for rank in range(2):
        with load(rank, 2) as loader:
            batches = iter(loader)
            taken += [next(batches) for _ in range(2)]  # others are made ahead
            states.append(loader.state_dict())
            batches.close()
    assert states[0] == states[1] == {"length": 20, "seed": 0, "epoch": 0, "taken": 8}
    rest = []
    for rank in range(3):
        with load(rank, 3, states[0]) as loader:
            assert loader.state_dict() == states[0]
            rest += list(loader)
            assert loader.state_dict()["epoch"] == 1
    found = {row: value for b in taken + rest for row, value in zip(b["x"][:, 0].tolist(), b["noise"], strict=True)}
    assert found == noise


def test_batches_that_are_not_full_on_all_ranks_are_left_out():
    for length, batches in ((23, 3), (24, 4), (25, 4)):  # of 2 ranks and 3 items each
        loaders = [DataLoader(Squares(length), ShardedSampler(length, (r, 2)), 3, drop_last=True) for r in range(2)]
        assert [len(collected(loader)) for loader in loaders] == [batches] * 2 == loaders[0].batch_counts()


def test_the_global_generators_of_worker_processes_differ_and_repeat():
    class Drawn(Squares):
        def __getitem__(self, index):
            return np.random.random(), random.random()

    def draw():
        with DataLoader(Drawn(6), ShardedSampler(6, (0, 1)), 2, workers=2, processes=True) as loader:
            return np.concatenate([np.ravel(batch) for batch in loader]).tolist()

    first = draw()
    assert first == draw()
    assert len(set(first)) == 12


def fail():
    raise KeyError("no such file")


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_an_error_of_the_data_set_comes_where_its_batch_would(options):
    special = {4: fail}
    with DataLoader(Squares(8, special), ShardedSampler(8, (0, 1), shuffle=False), 2, **options) as loader:
        batches = iter(loader)
        assert [next(batches)["x"][0, 0] for _ in range(2)] == [0, 2]
        with pytest.raises(KeyError, match="no such file") as caught:
            next(batches)
        if options:
            assert any("in batch 2 of epoch 0 (items 4, 5)" in note for note in caught.value.__notes__)
        special.clear()
        assert len(list(loader)) == 4  # new workers


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"was ended by SIGKILL \(the system may have run out"),
        (lambda: os._exit(3), "ended with exit status 3"),
        (lambda: exit(4), "ended with exit status 4"),
    ],
    ids=["killed", "_exit", "SystemExit"],
)
def test_a_worker_that_dies_is_named(end, words):
    data = Squares(8, {5: end})
    with DataLoader(data, ShardedSampler(8, (0, 1), shuffle=False), 2, workers=2, processes=True) as loader:
        batches = iter(loader)
        next(batches)
        next(batches)
        where = r"before it had made batch 2 of epoch 0 \(items 4, 5\)"
        with pytest.raises(DataWorkerError, match=rf"worker 0 \(process \d+\) of the DataLoader {words}.*{where}"):
            next(batches)


def test_a_worker_that_is_late_is_named():
    never = threading.Event()
    data = Squares(4, {2: never.wait})
    for options in ({"workers": 1}, {"workers": 1, "processes": True}):
        loader = DataLoader(data, ShardedSampler(4, (0, 1), shuffle=False), 2, timeout_s=0.3, **options)
        with loader, pytest.raises(DataWorkerError, match=r"worker 0 .* has not made batch 1 of epoch 0 .* in 0.3 s"):
            list(loader)
    never.set()


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it has not come"
        os.sched_yield()


def workers_left():
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("ferro-data")]
    return threads + [child.name for child in multiprocessing.active_children()]


@pytest.mark.parametrize("options", list(KINDS.values())[1:], ids=list(KINDS)[1:])
@pytest.mark.parametrize("how", ["close", "garbage", "break"])
def test_nothing_is_left_of_the_workers(options, how):
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    loader = DataLoader(Squares(40), ShardedSampler(40, (0, 1)), 2, **options)
    batches = iter(loader)
    next(batches)
    assert workers_left()
    if how == "close":
        loader.close()
    elif how == "break":
        batches.close()
    del batches, loader
    wait_until(lambda: not workers_left())
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 1


def test_workers_end_with_a_program_that_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "from ferro_strategies import ShardedSampler\n"
        "from ferro_strategies.data import DataLoader\n"
        "loader = DataLoader(range(10), ShardedSampler(10, (0, 1)), 2, workers=2, processes=True)\n"
        "next(iter(loader)), next(it := iter(loader))\n"
        "print(*(worker._process.pid for worker in loader._workers), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-9, "")
    processes = [f"/proc/{pid}" for pid in done.stdout.split()]
    assert len(processes) == 2
    wait_until(lambda: not any(map(os.path.exists, processes)))


def test_a_forked_child_has_workers_of_its_own():
    loader = DataLoader(Squares(8), ShardedSampler(8, (0, 1)), 2, workers=2, processes=True)
    expected = collected(loader)
    loader.sampler.set_epoch(0)
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            found = collected(loader)
            loader.close()
            os.write(writer, b"same" if found == expected else b"other")
        finally:
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 10) == b"same"
    os.waitpid(child, 0)
    os.close(reader)
    assert collected(loader) == expected
    loader.close()


def test_a_spawned_worker_serves_as_well():
    options = {"workers": 1, "processes": True, "start_method": "spawn"}
    with DataLoader(Squares(6), ShardedSampler(6, (0, 1)), 2, **options) as loader:
        found = collected(loader)
    assert found == collected(DataLoader(Squares(6), ShardedSampler(6, (0, 1)), 2))


def test_ranks_that_are_threads_have_loaders_with_processes():
    def work(group):
        with DataLoader(Squares(10), ShardedSampler(10, group), 2, workers=1, processes=True) as loader:
            return [row for rows, _ in collected(loader) for row in rows]

    assert sorted(row for rows in ferro.simulate(work, 2) for row in rows) == list(range(10))


def test_many_items_are_read_at_once_where_the_data_set_can():
    class Rows(Squares):
        def __getitems__(self, indices):
            return [np.array(index) for index in indices]

    assert [len(batch) for batch in DataLoader(Rows(5), ShardedSampler(5, (0, 1)), 2)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"workers": 1.5}, "workers must be a whole number"),
        ({"processes": True}, "processes=True needs workers="),
        ({"workers": 1, "start_method": "spawn"}, "needs processes=True"),
        ({"timeout_s": 0}, "timeout_s must be above 0"),
        ({"sampler": range(5)}, r"the sampler is a range. Give a ShardedSampler\(len\(dataset\), group\)"),
        ({"dataset": Squares(4)}, "the data set has 4 items, the sampler 5"),
    ],
)
def test_wrong_arguments_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        DataLoader(**{"dataset": Squares(5), "sampler": ShardedSampler(5, (0, 1)), "batch_size": 2, **options})


def test_item_rng_is_for_items_only():
    list(DataLoader(Squares(4), ShardedSampler(4, (0, 1)), 2))
    with pytest.raises(UsageError, match="only a data set that a DataLoader asks"):
        item_rng()
