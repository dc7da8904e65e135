"""Observers, metrics and the trace: told of every operation, and of no other."""

import json
import threading

import numpy as np
import pytest

import ferro
from ferro.errors import CollectiveMismatch, UsageError
from ferro.launch.trace import Trace
from ferro.observers import Event
from ferro.simulated import simulate


class Log:
    def __init__(self):
        self.lock = threading.Lock()
        self.events = []

    def started(self, event):
        with self.lock:
            self.events.append(("started", event))

    def finished(self, event):
        with self.lock:
            self.events.append(("finished", event))

    def close(self):
        pass


def test_each_operation_starts_and_ends_once_on_each_rank():
    log = Log()

    def work(group):
        group.all_reduce(np.ones(10, np.float32))
        group.all_gather(np.ones(3), async_op=True).wait()
        inner = group.subgroup(range(2), name="pair")
        inner.sendrecv(np.ones(4), np.empty(4), 1 - inner.rank)

    simulate(work, 2, observers=[log])
    for rank in range(2):
        mine = [(what, event) for what, event in log.events if event.rank == rank]
        assert [(what, e.op, e.seq, e.group, e.nbytes, e.error) for what, e in mine] == [
            (what, op, seq, group, nbytes, "")
            for op, seq, group, nbytes in (
                ("all_reduce", 0, "world", 40),
                ("all_gather", 1, "world", 48),
                ("sendrecv", 0, "pair", 64),
            )
            for what in ("started", "finished")
        ]
        assert all(e.seconds == 0.0 for what, e in mine if what == "started")
        assert all(e.seconds > 0.0 for what, e in mine if what == "finished")
        assert mine[0][1].thread == f"rank {rank}"
        assert mine[2][1].thread == "ferro-world-collectives"


def test_failures_are_told_with_the_error_that_the_caller_gets():
    log = Log()

    def work(group):
        with pytest.raises(UsageError):
            group.broadcast(1, 5)  # refused: not an operation at all
        with pytest.raises(CollectiveMismatch):
            group.all_reduce(np.ones(1 + group.rank))

    simulate(work, 2, observers=[log], timeout_s=5)
    assert [event.error for what, event in log.events if what == "finished"] == ["CollectiveMismatch"] * 2


def test_metrics_add_up_and_make_a_table():
    metrics = ferro.Metrics()

    def work(group):
        for _ in range(3):
            group.all_reduce(np.ones(2**18, np.float32))
        group.barrier()

    simulate(work, 2, observers=[metrics])
    totals = metrics.totals()
    assert set(totals) == {("world", "all_reduce"), ("world", "barrier")}
    reduced = totals["world", "all_reduce"]
    assert (reduced.count, reduced.nbytes, reduced.errors) == (6, 6 * 2**20, 0)
    assert reduced.seconds > 0
    totals["world", "barrier"].count = 99
    assert metrics.totals()["world", "barrier"].count == 2
    head, first, second = metrics.table().splitlines()
    assert head.split() == ["group", "operation", "calls", "MiB", "seconds", "errors"]
    assert {line.split()[1] for line in (first, second)} == {"all_reduce", "barrier"}
    assert ["world", "all_reduce", "6", "6.0"] in [first.split()[:4], second.split()[:4]]
    assert len({len(line) for line in (head, first, second)}) == 1


def event(**changes):
    values = {"op": "all_reduce", "seq": 3, "group": "dp", "rank": 0, "global_rank": 2}
    values |= {"nbytes": 64, "start_s": 100.0, "seconds": 0.25, "thread": "main"}
    return Event(**{**values, **changes})


def test_a_trace_is_what_perfetto_reads(tmp_path):
    trace = Trace(str(tmp_path / "parts"))
    trace.started(event(seconds=0.0))
    trace.finished(event())
    trace.finished(event(op="send", seq=0, thread="ferro-dp-send", error="PeerLost"))
    trace.close()
    (part,) = (tmp_path / "parts").iterdir()
    assert part.name == "rank2.json"
    events = json.loads(part.read_text())["traceEvents"]
    assert [(e["ph"], e["name"], e["pid"], e["tid"]) for e in events] == [
        ("M", "process_name", 2, 0),
        ("M", "thread_name", 2, 0),
        ("M", "thread_name", 2, 1),
        ("X", "all_reduce", 2, 0),
        ("X", "send", 2, 1),
    ]
    assert events[0]["args"] == {"name": "rank 2"}
    assert events[3] == {
        "ph": "X",
        "cat": "dp",
        "name": "all_reduce",
        "pid": 2,
        "tid": 0,
        "ts": 100e6,
        "dur": 0.25e6,
        "args": {"seq": 3, "bytes": 64, "error": ""},
    }
    assert events[4]["args"]["error"] == "PeerLost"


def test_a_trace_of_nothing_writes_nothing(tmp_path):
    Trace(str(tmp_path / "parts")).close()
    assert not list(tmp_path.iterdir())


def test_an_observer_that_raises_changes_nothing_but_warns():
    class Broken:
        def started(self, event):
            raise ValueError("a bug of the observer")

        def finished(self, event):
            raise ValueError("another")

        def close(self):
            pass

    with pytest.warns(RuntimeWarning, match="observer Broken failed at all_reduce #0"):
        results = simulate(lambda group: float(group.all_reduce(1.0)), 2, observers=[Broken()])
    assert results == [2.0, 2.0]
