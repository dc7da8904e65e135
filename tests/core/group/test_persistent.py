"""Persistent operations: how they are made, refused, started, waited for and closed; their memory and their errors.

The kit's checks (`ferro_testing.repetitions`) compare their results with ordinary calls on every backend.
"""

import gc
import time
import weakref

import numpy as np
import pytest

import ferro
from ferro.simulated import Fault, simulate

S = 5.0


def run(work, n=2, **options):
    return simulate(work, n, timeout_s=S, run_timeout_s=30, **options)


X = np.arange(6.0)
BAD = {
    "name": (lambda g: g.persistent("sum", X), "there is no operation 'sum': use one of all_reduce"),
    "no input": (lambda g: g.persistent("all_reduce"), "the input is missing: pass an array"),
    "async": (lambda g: g.persistent("all_reduce", X, async_op=True), "takes (x, op, out=, timeout_s=), not async_op"),
    "async send": (
        lambda g: g.persistent("send", X, 1 - g.rank, async_op=True),
        "takes (x, dst, tag, timeout_s=), not async_op",
    ),
    "list": (lambda g: g.persistent("all_reduce", [1.0]), "the input is a list: pass an array"),
    "scalar": (lambda g: g.persistent("all_reduce", np.float64(1)), "the input is a float64: pass an array"),
    "root": (lambda g: g.persistent("broadcast", X, 2), "root is 2; group 'world' has ranks 0 to 1"),
    "reduction": (lambda g: g.persistent("all_reduce", X, op="avg"), "unknown reduction 'avg'"),
    "out": (lambda g: g.persistent("all_reduce", X, out=np.empty(5)), "out has shape"),
    "deadline": (lambda g: g.persistent("all_reduce", X, timeout_s=0), "timeout_s must be a positive number"),
    "peer": (lambda g: g.persistent("send", X, g.rank), "cannot send to itself"),
    "source": (lambda g: g.persistent("recv", X.copy(), 9), "peer is 9; group 'world' has ranks 0 to 1"),
    "no source": (lambda g: g.persistent("recv", X.copy()), "peer is None; group 'world' has ranks 0 to 1"),
    "pairs": (lambda g: g.persistent("exchange", [X], []), "must be a list of pairs"),
    "overlap": (lambda g: g.persistent("exchange", [(1 - g.rank, X)], [(1 - g.rank, X)]), "shares memory"),
    "sizes to itself": (
        lambda g: g.persistent("exchange", [(g.rank, X)], [(g.rank, np.empty(5))]),
        "sends itself [(6, dtype('float64'))] and receives [(5, dtype('float64'))]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_refused_before_anything_is_sent(name):
    call, text = BAD[name]

    def work(group):
        with pytest.raises(ferro.UsageError) as caught:
            call(group)
        assert text in str(caught.value)
        return float(group.all_reduce(1.0))

    assert run(work) == [2.0, 2.0]


def test_the_result_is_one_array_and_the_input_may_be_rewritten():
    def work(group):
        x = np.full(3, 1.0 + group.rank)
        step = group.persistent("all_reduce", x)
        first = step()
        assert first is not x
        x *= 10
        assert step() is first
        return first.tolist(), x.tolist()

    assert run(work) == [([30.0] * 3, [10.0] * 3), ([30.0] * 3, [20.0] * 3)]


def test_an_input_that_is_not_contiguous_is_read_anew_by_each_step():
    def work(group):
        whole = np.zeros((4, 3))
        columns = {
            name: group.persistent(name, whole[:, 1])
            for name in ("all_reduce", "all_gather", "gather", "reduce_scatter", "all_to_all", "broadcast", "scan")
        }
        ghost = np.empty(4)
        exchange = group.persistent("exchange", [(1 - group.rank, whole[:, 1])], [(1 - group.rank, ghost)])
        found = []
        for value in (1.0, 2.0):
            whole[:, 1] = value * (group.rank + 1)
            results = {name: step() for name, step in columns.items()}
            exchange()
            found.append(
                [None if result is None else result.tolist() for result in results.values()] + [ghost.tolist()]
            )
        return found

    for rank, found in enumerate(run(work)):
        for value, results in zip((1.0, 2.0), found, strict=True):
            low, high, total = [value] * 4, [2 * value] * 4, [3 * value] * 4
            assert results[0] == total
            assert results[1] == low + high
            assert results[2] == (low + high if rank == 0 else None)
            assert results[3] == total[:2]
            assert results[4] == low[:2] + high[:2]
            assert results[5] == low
            assert results[6] == (total if rank else low)
            assert results[7] == (low if rank else high)


def test_uneven_sizes_and_a_scatter_whose_shape_only_the_root_knows():
    def work(group):
        n, me = group.world_size, group.rank
        rows = np.full(me + 1, float(me))
        gather = group.persistent("all_gather", rows, sizes=[1, 2, 3])
        unknown = group.persistent("all_gather", rows, sizes="any")
        swap = group.persistent("all_to_all", np.repeat(np.arange(n), me + 1) * 1.0, send_sizes=[me + 1] * n)
        source = np.arange(6.0) if me == 0 else None
        scatter = group.persistent("scatter", source, 0, sizes=[1, 2, 3])
        found = []
        for _ in range(3):
            found.append([gather().tolist(), unknown().tolist(), swap().tolist(), scatter().tolist()])
            rows += 1
            if source is not None:
                source += 1
        return found

    for rank, found in enumerate(run(work, 3)):
        for step, (gathered, unknown, swapped, block) in enumerate(found):
            assert gathered == unknown == [0.0 + step, 1.0 + step, 1.0 + step, 2.0 + step, 2.0 + step, 2.0 + step]
            assert swapped == [float(rank)] * 6
            start = rank * (rank + 1) // 2
            assert block == [float(start + step + k) for k in range(rank + 1)]


def test_other_uses_of_a_started_step_are_refused():
    def work(group):
        step = group.persistent("barrier")
        with pytest.raises(ferro.UsageError, match=r"call start\(\) first"):
            step.wait()
        step.start()
        assert "started" in repr(step)
        for use in (step, step.start):
            with pytest.raises(ferro.UsageError, match=r"call wait\(\) first"):
                use()
        step.wait()
        step()
        step.start()
        step.close()  # it waits
        step.close()
        for use in (step, step.start):
            with pytest.raises(ferro.UsageError, match="was closed: make a new one"):
                use()
        with group.persistent("barrier") as other:
            other()
        return repr(other)

    assert run(work) == ["<PersistentOperation barrier, closed>"] * 2


def test_it_keeps_its_arrays_and_closing_lets_them_go():
    def work(group):
        x = group.empty(1000)
        x[:] = 1
        kept = weakref.ref(x)
        step = group.persistent("all_reduce", x)
        del x
        gc.collect()
        assert kept() is not None
        total = float(step()[0])
        step.close()
        gc.collect()
        return total, kept() is None

    assert run(work) == [(2.0, True)] * 2


def test_a_rank_that_runs_another_operation_in_place_of_a_step_is_found():
    def work(group):
        step = group.persistent("all_reduce", np.ones(3))
        step()
        with pytest.raises(ferro.CollectiveMismatch) as caught:
            step() if group.rank else group.all_reduce(np.ones(3))
        assert group.state == "dead"
        with pytest.raises(ferro.GroupClosed):
            step()
        return str(caught.value)

    texts = run(work)
    assert texts[0] == texts[1]
    assert "PersistentOperation (all_reduce(3 x float64, op=sum, persistent 1, shape 3)" in texts[0]
    assert "test_persistent.py:" in texts[0]


def test_a_rank_that_stays_away_is_a_timeout_of_the_operations_own_deadline():
    def work(group):
        step = group.persistent("barrier", timeout_s=0.3)
        if group.rank:
            time.sleep(1.0)
            return None
        began = time.monotonic()
        with pytest.raises(ferro.CollectiveTimeout) as caught:
            step()
        assert list(caught.value.missing) == [1]
        return time.monotonic() - began

    assert 0.3 <= run(work)[0] < S


def test_a_killed_rank_is_lost_in_a_step_and_the_rest_make_new_operations():
    def work(group):
        step = group.persistent("all_reduce", np.ones(1))
        try:
            for _ in range(20):
                step()
        except ferro.PeerLost as lost:
            rest = group.shrink(timeout_s=2)
            return lost.peer, float(rest.persistent("all_reduce", np.ones(1))()[0])

    assert run(work, 3, faults=[Fault(rank=1, after=20, kind="kill")]) == [(1, 2.0), None, (1, 2.0)]


def test_observers_are_told_of_each_step():
    metrics = ferro.Metrics()

    def work(group):
        step = group.persistent("all_reduce", np.ones(4))
        for _ in range(5):
            step()
        group.persistent("exchange", [(1 - group.rank, np.ones(4))], [(1 - group.rank, np.empty(4))])()

    run(work, observers=[metrics])
    totals = metrics.totals()
    assert totals["world", "all_reduce"].count == 10
    assert totals["world", "exchange"].count == 2


def test_a_persistent_send_and_receive():
    def work(group):
        x = np.zeros(2)
        step = group.persistent(*(("recv", x, 0) if group.rank else ("send", x, 1)), 3)
        found = []
        for value in range(4):
            if group.rank == 0:
                x[:] = value
            if value % 2:
                step()
            else:
                step.start()
                step.wait()
            found.append(x.tolist())
        both = group.persistent("sendrecv", np.full(2, group.rank), y := np.empty(2, int), 1 - group.rank)
        both()
        return found, y.tolist()

    wanted = [[float(value)] * 2 for value in range(4)]
    assert run(work) == [(wanted, [1, 1]), (wanted, [0, 0])]


def test_an_exchange_whose_messages_have_no_receiver_is_a_mismatch_on_every_rank():
    def work(group):
        sends = [(1, np.ones(4))] if group.rank == 0 else []
        recvs = [(0, np.empty(5))] if group.rank == 1 else []
        with pytest.raises(ferro.CollectiveMismatch) as caught:
            group.persistent("exchange", sends, recvs)
        return str(caught.value)

    texts = run(work, 3)
    assert "rank 0 sends 4 x float64 to rank 1, which receives 5 x float64" in texts[0]
    assert texts[0] == texts[1] == texts[2]


def test_an_exchange_of_nothing_and_with_itself():
    def work(group):
        group.exchange([], [])
        group.exchange([], [], async_op=True).wait()
        a, b = np.ones(3), np.zeros(3)
        group.exchange([(group.rank, a)], [(group.rank, b)])
        step = group.persistent("exchange", [(group.rank, a)], [(group.rank, b)])
        a += 1
        step()
        return b.tolist()

    assert run(work) == [[2.0] * 3] * 2


def test_a_structured_input_that_is_not_contiguous_is_read_anew_by_each_step():
    def work(group):
        base = np.zeros(6, [("a", "f8"), ("b", "i4")])
        step = group.persistent("all_gather", base[::2])
        found = []
        for value in (1.0, 2.0):
            base["a"] = value * (group.rank + 1)
            found.append(step()["a"].tolist())
        return found

    assert run(work) == [[[1.0] * 3 + [2.0] * 3, [2.0] * 3 + [4.0] * 3]] * 2


def test_an_exchange_refused_on_one_rank_may_be_made_again():
    def work(group):
        x, y, other = np.full(2, float(group.rank)), np.empty(2), 1 - group.rank
        if group.rank == 0:
            with pytest.raises(ferro.UsageError):
                group.persistent("exchange", [(7, x)], [])
        group.persistent("exchange", [(other, x)], [(other, y)])()
        return y.tolist()

    assert run(work) == [[1.0, 1.0], [0.0, 0.0]]


def test_a_closed_group_runs_no_exchange_with_itself():
    def work(group):
        step = group.persistent("exchange", [(0, np.ones(1))], [(0, np.zeros(1))])
        group.close()
        with pytest.raises(ferro.GroupClosed):
            step()

    run(work, 1)


def test_prefixes_and_extrema_are_computed_anew_by_each_step():
    def work(group):
        x = np.array([1.0, 5.0 - group.rank])
        names = ("scan", "exscan", "min_loc", "max_loc")
        steps = [group.persistent(name, x) for name in names]
        found = []
        for _ in range(2):
            scanned, before, (least, where), (most, there) = (step() for step in steps)
            found.append([a.tolist() for a in (scanned, before, least, where, most, there)])
            x *= 2
        return found

    first, second = run(work)
    assert first[0] == [[1.0, 5.0], [0.0, 0.0], [1.0, 4.0], [0, 1], [1.0, 5.0], [0, 0]]
    assert first[1] == [[2.0, 10.0], [0.0, 0.0], [2.0, 8.0], [0, 1], [2.0, 10.0], [0, 0]]
    assert second[1] == [[4.0, 18.0], [2.0, 10.0], [2.0, 8.0], [0, 1], [2.0, 10.0], [0, 0]]
