"""ProcessGroup: wrong calls get a clear error before anything moves, and the group stays good."""

import copy
import logging
import threading

import numpy as np
import pytest

from ferro.errors import GroupClosed, UnsupportedError, UsageError
from ferro.simulated import simulate

CupyArray = type("ndarray", (), {"__module__": "cupy", "dtype": np.dtype(float), "shape": (3,)})


def refused(call, world_size=2):
    """Make a wrong call on every rank; return rank 0's error, having proved that all go on."""

    def work(group):
        try:
            call(group)
        except (UsageError, UnsupportedError) as error:
            assert group.all_reduce(1) == group.world_size
            return error
        raise AssertionError("nothing was raised")

    errors = simulate(work, world_size, timeout_s=5, run_timeout_s=10)
    assert len({type(error) for error in errors}) == 1
    return errors[0]


X = np.arange(6.0)


def read_only(count):
    array = np.zeros(count)
    array.flags.writeable = False
    return array


BAD = {
    "root too large": (lambda g: g.broadcast(X, 2), UsageError, "root is 2; group 'world' has ranks 0 to 1"),
    "root negative": (lambda g: g.reduce(X, -1), UsageError, "root is -1; group 'world'"),
    "root no number": (lambda g: g.gather(X, "0"), UsageError, "root is '0'"),
    "root of objects": (lambda g: g.broadcast_object(1, 9), UsageError, "root is 9"),
    "peer out of range": (lambda g: g.send(X, 2), UsageError, "peer is 2; group 'world' has"),
    "peer of object": (lambda g: g.send_object(1, 7), UsageError, "peer is 7"),
    "send to itself": (lambda g: g.send(X, g.rank), UsageError, "rank 0 cannot send to itself: copy the array"),
    "receive from itself": (lambda g: g.recv(np.empty(3), g.rank), UsageError, "rank 0 cannot receive from itself"),
    "send to itself, receive from another": (
        lambda g: g.sendrecv(X, np.empty(6), g.rank, 1 - g.rank),
        UsageError,
        "cannot send to itself",
    ),
    "exchange of two sizes with itself": (
        lambda g: g.sendrecv(X, np.empty(5), g.rank),
        UsageError,
        "the buffer takes 5 x float64, the message has 6 x float64",
    ),
    "tag": (lambda g: g.send(X, 1 - g.rank, 1 << 31), UsageError, "tags are whole numbers from 0 to 2147483647"),
    "out of another shape": (
        lambda g: g.all_reduce(X, out=np.empty(5)),
        UsageError,
        r"out has shape \(5,\) and dtype float64; the result has shape \(6,\)",
    ),
    "out of another dtype": (
        lambda g: g.all_gather(X, out=np.empty(12, np.float32)),
        UsageError,
        "out has shape .* and dtype float32; the result has .* dtype float64",
    ),
    "out not contiguous": (
        lambda g: g.all_reduce(X, out=np.empty(12)[::2]),
        UsageError,
        "out is not contiguous: pass a contiguous array",
    ),
    "out read-only": (
        lambda g: g.all_reduce(X, out=read_only(6)),
        UsageError,
        "out is read-only: pass a writable array",
    ),
    "out no array": (lambda g: g.all_reduce(X, out=[0.0] * 6), UsageError, "out must be an array, not list"),
    "receive into read-only": (lambda g: g.recv(read_only(3), 1 - g.rank), UsageError, "buffer is read-only"),
    "rows that do not divide": (
        lambda g: g.reduce_scatter(np.ones(5)),
        UsageError,
        "reduce_scatter cuts axis 0 into 2 equal blocks, but it has 5 rows: give sizes=",
    ),
    "rows of all_to_all": (
        lambda g: g.all_to_all(np.ones(3)),
        UsageError,
        "all_to_all cuts axis 0 into 2 equal blocks, but it has 3 rows: give send_sizes=",
    ),
    "scatter of nothing": (lambda g: g.scatter(None, g.rank), UsageError, "scatter: the root must give an array"),
    "no axis to cut": (
        lambda g: g.reduce_scatter(np.array(1.0)),
        UsageError,
        "cuts its input along axis 0, and a 0-d array has none",
    ),
    "sizes of another sum": (
        lambda g: g.reduce_scatter(X, sizes=[3, 4]),
        UsageError,
        "sizes sum up to 7, but axis 0 has 6 rows",
    ),
    "sizes of another number": (
        lambda g: g.all_gather(X, sizes=[6]),
        UsageError,
        r"sizes must be 2 non-negative whole numbers, not \[6\]",
    ),
    "negative sizes": (
        lambda g: g.reduce_scatter(X, sizes=[7, -1]),
        UsageError,
        "sizes must be 2 non-negative whole numbers",
    ),
    "fractions as sizes": (
        lambda g: g.reduce_scatter(X, sizes=[2.5, 3.5]),
        UsageError,
        "sizes must be 2 whole numbers",
    ),
    "sizes not of this array": (
        lambda g: g.all_gather(X, sizes=[5, 5]),
        UsageError,
        r"sizes\[0\] is 5, but x has 6 rows on this rank",
    ),
    "receive sizes alone": (
        lambda g: g.all_to_all(X, recv_sizes=[3, 3]),
        UsageError,
        "recv_sizes needs send_sizes as well",
    ),
    "sizes that disagree with themselves": (
        lambda g: g.all_to_all(X, send_sizes=[2, 4], recv_sizes=[4, 2]),
        UsageError,
        "sends itself . rows but receives",
    ),
    "unknown reduction": (
        lambda g: g.all_reduce(X, "median"),
        UsageError,
        "unknown reduction 'median': use one of sum, mean, prod",
    ),
    "reduction no function": (
        lambda g: g.all_reduce(X, 3),
        UsageError,
        "a reduction is a name, such as 'sum', or a function",
    ),
    "mean of integers": (
        lambda g: g.all_reduce(np.arange(3), "mean"),
        UnsupportedError,
        "op='mean' is not defined for int64: convert",
    ),
    "order of complex numbers": (
        lambda g: g.all_reduce(np.ones(3, complex), "max"),
        UnsupportedError,
        "complex numbers have no order",
    ),
    "bits of floats": (
        lambda g: g.all_reduce(X, "bor"),
        UnsupportedError,
        "bitwise reductions take integers and booleans",
    ),
    "dtype str": (lambda g: g.all_reduce(np.array(["a"])), UnsupportedError, "dtype <U1, which no collective carries"),
    "dtype object": (
        lambda g: g.broadcast(np.array([None])),
        UnsupportedError,
        "dtype object, which no collective carries",
    ),
    "dates": (
        lambda g: g.all_reduce(np.array(["2020-01-01"], "M8[D]"), "max"),
        UnsupportedError,
        r"which is moved but not reduced: pass x\.view\(.int64.\), in which NaT",
    ),
    "foreign byte order": (
        lambda g: g.all_reduce(X.astype(">f8")),
        UnsupportedError,
        "foreign byte order dtype >f8: convert it",
    ),
    "long double": (
        lambda g: g.all_reduce(X.astype(np.longdouble)),
        UnsupportedError,
        "whose layout differs between machines",
    ),
    "Python values": (
        lambda g: g.all_reduce({"a": 1}),
        UsageError,
        r"input is a dict, not an array of numbers; .* \*_object methods",
    ),
    "ragged list": (lambda g: g.all_reduce([[1], [1, 2]]), UsageError, "input is not an array"),
    "GPU array": (
        lambda g: g.all_reduce(CupyArray()),
        UnsupportedError,
        "backend 'simulated' takes arrays on cpu, and this one is on cuda: .*FERRO_ENABLE_GPU_FALLBACK=1",
    ),
    "GPU array to coalesce": (lambda g: g.coalesce().all_reduce(CupyArray()), UnsupportedError, "takes arrays on cpu"),
    "unsafe value": (
        lambda g: g.all_gather_object({"key": [1, object()]}),
        UsageError,
        r"value\['key'\]\[1\] is a object, which has no safe encoding",
    ),
    "unknown codec": (
        lambda g: g.all_gather_object(1, codec="yaml"),
        UsageError,
        "codec must be 'msgpack' or 'pickle', not 'yaml'",
    ),
    "objects to scatter": (
        lambda g: g.scatter_object([1], g.rank),
        UsageError,
        "scatter_object needs 2 values at the root, got 1",
    ),
    "no time": (lambda g: g.barrier(timeout_s=0), UsageError, "timeout_s must be a positive number of seconds"),
    "a time in words": (
        lambda g: g.barrier(timeout_s="1"),
        UsageError,
        "timeout_s must be a positive number of seconds",
    ),
    "a color in words": (lambda g: g.split("a"), UsageError, "color must be None or a number"),
    "not a time": (
        lambda g: g.barrier(timeout_s=float("nan")),
        UsageError,
        "timeout_s must be a positive number of seconds",
    ),
    "negative color": (lambda g: g.split(-2), UsageError, "None or a number from 0"),
    "stranger in a subgroup": (
        lambda g: g.subgroup([0, 1, 2]),
        UsageError,
        r"subgroup \(0, 1, 2\): group 'world' has ranks 0 to 1",
    ),
    "subgroup of others": (
        lambda g: g.subgroup([1 - g.rank]),
        UsageError,
        "does not include this rank, 0: only members call it",
    ),
    "rank twice in a subgroup": (lambda g: g.subgroup([0, 1, 1]), UsageError, "names a rank twice"),
    "shrink a live group": (lambda g: g.shrink(), UsageError, "shrink"),
}


@pytest.mark.parametrize(("call", "kind", "words"), BAD.values(), ids=BAD)
def test_a_wrong_call_is_refused_before_anything_moves(call, kind, words):
    error = refused(call)
    assert type(error) is kind
    with pytest.raises(kind, match=words):
        raise error


def test_gpu_arrays_go_through_the_host_where_the_user_allowed_it(monkeypatch, caplog):
    """A stand-in for CuPy, whose arrays know nothing but how to be copied."""
    from dataclasses import replace

    from ferro.group.group_info import GroupInfo
    from ferro.group.process_group import ProcessGroup
    from ferro.rendezvous import MemoryStore
    from ferro.simulated import SimulatedBackend

    class Cupy:
        @staticmethod
        def asnumpy(array):
            return array.held

        @staticmethod
        def asarray(held):
            array = CupyArray()
            array.held = held
            return array

    monkeypatch.setitem(__import__("sys").modules, "cupy", Cupy)
    store = MemoryStore()
    info = GroupInfo(
        name="world", backend_name="simulated", global_ranks=(0,), hosts=("here",), job_store=store, store=store
    )
    (backend,) = SimulatedBackend.create_group(1)
    group = ProcessGroup(backend, replace(info, host_copies=True))
    given = Cupy.asarray(np.arange(3.0))
    with caplog.at_level(logging.WARNING, "ferro"):
        results = [group.all_reduce(given) for _ in range(2)]
    assert all(type(result) is CupyArray for result in results)
    assert results[0].held.tolist() == [0.0, 1.0, 2.0]
    assert [r.message for r in caplog.records] == ["group 'world' (simulated) copies GPU arrays through the host"]


def test_a_closed_group_says_so():
    def work(group):
        group.close()
        group.close()
        with pytest.raises(GroupClosed, match="all_reduce on group 'world': the group was closed"):
            group.all_reduce(X)
        with pytest.raises(GroupClosed, match="subgroup on group 'world'"):
            group.subgroup([group.rank])
        return repr(group)

    assert simulate(work, 1) == ["<ProcessGroup 'world', rank 0 of 1, simulated, closed>"]


def test_a_wrong_call_on_one_rank_can_be_made_again():
    def work(group):
        if group.rank == 1:
            with pytest.raises(UsageError):
                group.all_reduce(X, out=np.empty(1))
        return group.all_reduce(X).tolist()

    assert simulate(work, 2, timeout_s=5) == [(X * 2).tolist()] * 2


def test_results_are_of_the_callers_kind():
    def work(group):
        return [group.all_reduce(2), group.all_reduce([1.5]), group.broadcast(np.float32(1))]

    for whole, real, single in simulate(work, 2):
        assert (whole.shape, whole.dtype, whole.item()) == ((), np.int64, 4)
        assert (real.shape, real.dtype, real.tolist()) == ((1,), np.float64, [3.0])
        assert single.dtype == np.float32


def test_a_group_knows_who_it_is():
    def work(group):
        inner = group.split(group.rank // 2)
        return (inner.name, inner.rank, inner.world_size, inner.global_ranks, inner.local_rank)

    assert simulate(work, 3) == [("world.0", 0, 2, (0, 1), 0), ("world.0", 1, 2, (0, 1), 1), ("world.1", 0, 1, (2,), 2)]


def test_a_users_function_need_not_be_commutative():
    def first(a, b, out):
        np.copyto(out, a)

    def work(group):
        mine = np.full(3, group.rank)
        reduced = group.reduce(mine, root=3, op=first)
        scattered = group.reduce_scatter(np.full(8, group.rank), op=first)
        everywhere = group.all_reduce(mine, first).tolist()
        return everywhere, scattered.tolist(), None if reduced is None else reduced.tolist()

    results = simulate(work, 8, timeout_s=5)
    assert [result[:2] for result in results] == [([0, 0, 0], [0])] * 8
    assert results[3][2] == [0, 0, 0]


def test_a_mean_by_an_algorithm_that_says_nothing_of_combining_once():
    from dataclasses import replace

    from ferro.collectives.builtin import BUILTIN
    from ferro.collectives.choice import Choice
    from ferro.simulated import SimulatedBackend

    [exchange] = [i for i in BUILTIN if (i.collective, i.algorithm) == ("all_reduce", "exchange")]
    modest = replace(exchange, algorithm="modest", combines_once=False)
    original = SimulatedBackend.create_group.__func__

    def create_group(cls, world_size, *, choice, **others):
        return original(cls, world_size, choice=Choice(fixed={"all_reduce": modest}), **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedBackend, "create_group", classmethod(create_group))
        results = simulate(lambda group: float(group.all_reduce(4.0, "mean")), 4, timeout_s=5)
    assert results == [4.0] * 4


def test_a_tag_for_every_message_does_not_disturb_the_order_of_collectives():
    """More executors of transfers than are kept: only idle ones go, and never the collectives'."""

    def work(group):
        group.barrier()
        for tag in range(600):
            if group.rank == 0:
                group.send(np.array(tag), 1, tag)
            elif group.rank == 1:
                assert group.recv(np.array(0), 0, tag) == tag
        return float(group.all_reduce(1.0))

    assert simulate(work, 3, timeout_s=5) == [3.0] * 3


def test_a_copied_model_has_the_same_group():
    def run(group):
        return copy.deepcopy({"group": group})["group"] is group

    assert simulate(run, 2) == [True, True]


def test_close_waits_for_a_sendrecv_whose_halves_wait_for_earlier_transfers():
    closing = threading.Event()

    def work(group):
        if group.rank == 1:
            assert closing.wait(5)
            group.send(np.array(1.0), 0)
            return float(group.sendrecv(np.array(2.0), np.array(0.0), 0))
        first = group.recv(np.array(0.0), 1, async_op=True)
        second = group.sendrecv(np.array(3.0), np.array(0.0), 1, async_op=True)
        close = group._dispatcher._transfers.close

        def announced_close(deadline):
            closing.set()
            return close(deadline)

        group._dispatcher._transfers.close = announced_close
        group.close()
        return float(first.wait()), float(second.wait())

    assert simulate(work, 2, timeout_s=5, run_timeout_s=20) == [(1.0, 2.0), 3.0]
