"""Groups on several hosts: ranks are threads that claim to be on hosts."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import ferro
from ferro_gloo.backend import GlooBackend
from ferro_gloo.hierarchy import data_movement, topology
from ferro_gloo.hierarchy.backend import HierarchicalBackend
from ferro_gloo.hierarchy.groups import no_phase
from ferro_gloo.hierarchy.host_blocks import HostBlocks
from ferro_gloo.hierarchy.topology import Topology
from ferro_gloo.tcp.backend import TcpBackend
from ferro_testing import conformance
from ferro_testing.case import Case

from ..conftest import outcomes_in_threads

LAYOUTS = {
    "even": [[0, 1], [2, 3]],
    "uneven": [[0], [1, 2, 3]],
    "interleaved": [[0, 2], [1, 3, 4]],
    "three hosts": [[0, 3], [1], [2, 4]],
}
DATA = (conformance.check_reductions, conformance.check_movements, conformance.check_uneven)


def connect_gloo(layout, config):
    """Return this rank's group, which finds out who shares its memory."""
    host = next(number for number, host in enumerate(layout) if config.rank in host)
    return GlooBackend.connect(replace(config, host_id=f"host {host}"))


def connect_over_tcp(layout, config):
    """Return this rank's group, whose hosts are parts of the group over TCP."""
    flat = TcpBackend.connect(config)
    mine = next(host for host in layout if config.rank in host)
    return HierarchicalBackend(flat, layout, flat.subset(mine))


def results(layout, function, *, deterministic=False, connect=connect_gloo):
    """Run a function on every rank; return its results."""
    runner = case_of(layout, connect).runner
    size = sum(map(len, layout))
    outcomes = runner(function, size, (), timeout_s=20.0, deterministic=deterministic)
    failed = [outcome.describe() for outcome in outcomes if not outcome.ok]
    assert not failed, "\n".join(failed)
    return [outcome.result for outcome in outcomes]


def case_of(layout, connect=connect_gloo):
    """Return the conformance kit's case of these hosts."""
    runner = partial(outcomes_in_threads, partial(connect, layout))
    return Case(backend="gloo", world_sizes=(sum(map(len, layout)),), timeout_s=20, runner=runner)


@pytest.fixture
def slices(monkeypatch):
    """Make small arrays large: cut in slices, moved in many blocks and segments."""
    monkeypatch.setattr(topology, "_LEADERS_BYTES", 16)
    monkeypatch.setattr(topology, "_BLOCK_BYTES", 200_000)
    monkeypatch.setattr(data_movement, "_SEGMENT_BYTES", 100_000)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("check", DATA, ids=lambda check: check.__name__)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_data_in_slices(layout, check):
    check(case_of(layout))


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_conforms(check):
    check(case_of(LAYOUTS["three hosts"]))


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("check", DATA, ids=lambda check: check.__name__)
def test_data_over_tcp_within_hosts(check):
    check(case_of(LAYOUTS["interleaved"], connect_over_tcp))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_group_knows_that_it_is_on_several_hosts(layout):
    def collectives_type(group):
        group.barrier()
        return type(group._backend._collectives)

    assert set(results(layout, collectives_type)) == {HierarchicalBackend}


# -- floating point -------------------------------------------------------------------------------


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("deterministic", [False, True])
def test_sums_in_many_blocks_have_the_same_bits_on_all_ranks(deterministic):
    layout = LAYOUTS["interleaved"]
    inputs = [np.random.default_rng(rank).standard_normal(200_001) for rank in range(5)]

    def total(group):
        return group.all_reduce(inputs[group.rank])

    totals = results(layout, total, deterministic=deterministic)
    assert len({each.tobytes() for each in totals}) == 1
    in_order = inputs[0] + inputs[1] + inputs[2] + inputs[3] + inputs[4]
    assert np.allclose(totals[0], in_order, rtol=1e-12, atol=1e-12)
    assert (totals[0].tobytes() == in_order.tobytes()) == deterministic


@pytest.mark.usefixtures("slices")
def test_how_errors_of_arithmetic_are_treated_goes_along_to_the_other_thread():
    def overflow(group):
        with np.errstate(over="ignore"):  # a warning, which is an error here, otherwise
            return group.all_reduce(np.full(200_000, 3e38 / 2, np.float32))

    for result in results(LAYOUTS["even"], overflow):
        assert np.isinf(result).all()


# -- failing --------------------------------------------------------------------------------------


def caught(call):
    try:
        call()
    except ferro.FerroError as error:
        return type(error).__name__, str(error), error.peer
    return "nothing", "", None


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("odd", range(5))
@pytest.mark.parametrize("count", [4, 200_000])
def test_a_rank_that_differs_is_told_to_all_in_the_same_words(odd, count):
    """The odd one is a leader, on the second rail, or on none."""

    def differ(group):
        x = np.ones(count, np.float32)
        if group.rank == odd:
            return caught(lambda: group.all_gather(x))
        return caught(lambda: group.all_reduce(x))

    told = results(LAYOUTS["interleaved"], differ)
    assert {kind for kind, _, _ in told} == {"CollectiveMismatch"}, told
    texts = {text for _, text, _ in told}
    assert len(texts) == 1
    for word in ("all_gather", "all_reduce", f"rank {odd} called"):
        assert word in texts.copy().pop()


CALLS = {
    "all_reduce": lambda group, x: group.all_reduce(x),
    "reduce": lambda group, x: group.reduce(x, 1),
    "broadcast": lambda group, x: group.broadcast(x, 1),
    "all_gather": lambda group, x: group.all_gather(x),
    "reduce_scatter": lambda group, x: group.reduce_scatter(x),
    "all_to_all": lambda group, x: group.all_to_all(x),
}


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_rank_that_leaves_is_named_on_all_others(call):
    def leave(group):
        x = np.ones(200_000)
        if group.rank == 4:  # on no rail: the ranks on its host notice
            call(group, x)
            group.abandon()
            return None
        return caught(lambda: [call(group, x) for _ in range(100)])

    told = results(LAYOUTS["interleaved"], leave)
    assert {(kind, peer) for kind, _, peer in told[:4]} == {("PeerLost", 4)}, told


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("absent", [0, 4])
def test_a_rank_that_stalls_is_named_on_all(absent):
    gone = threading.Barrier(5)

    def stall(group):
        x = np.ones(200_000)
        group.all_reduce(x)
        told = None
        if group.rank != absent:
            told = caught(lambda: group.all_reduce(x, timeout_s=1.5))
        gone.wait(20)
        return told

    told = results(LAYOUTS["interleaved"], stall)
    others = [each for rank, each in enumerate(told) if rank != absent]
    assert {kind for kind, _, _ in others} == {"CollectiveTimeout"}, told
    assert len({text for _, text, _ in others}) == 1
    assert f"did not arrive: rank {absent}" in others[0][1]


# -- the parts ------------------------------------------------------------------------------------


def test_the_hosts_of_the_picture():
    """See `topology`: two rails, and rank 4 on none."""
    view = [Topology.of([[0, 2], [1, 3, 4]], rank) for rank in range(5)]
    assert [(v.host_index, v.local_rank, v.rails) for v in view] == [
        (0, 0, 2),
        (1, 0, 2),
        (0, 1, 2),
        (1, 1, 2),
        (1, 2, 2),
    ]
    assert view[0].host_ranks == (0, 2)
    assert view[0].locate(4) == (1, 2)
    assert [view[0].leader_for(local_rank) for local_rank in range(3)] == [0, 1, 0]
    assert Topology.of([[0], [1], [2], [3]], 2).other_hosts == (3, 0, 1)


def test_a_small_call_is_for_leaders_and_a_large_one_has_many_blocks():
    assert topology.uses_leaders(0)
    assert not topology.uses_leaders(1 << 30)
    assert topology.block_count(0) == 1
    assert topology.block_count(64 << 20) > 2


@pytest.mark.parametrize(("host", "is_copy"), [((1, 2), False), ((0, 2), True), ((1,), False)])
def test_host_blocks_are_the_buffer_itself_where_its_ranks_follow_one_another(host, is_copy):
    buffer, counts = np.arange(10), [2, 0, 5, 3]
    host_blocks = HostBlocks.of(buffer, counts, host)
    assert host_blocks.is_copy == is_copy
    host_blocks.pack()
    wanted = np.concatenate([np.split(buffer, [2, 2, 7])[rank] for rank in host])
    assert host_blocks.packed.tolist() == wanted.tolist()
    host_blocks.packed[...] += 100
    host_blocks.unpack()
    changed = [index for index in range(10) if buffer[index] >= 100]
    assert changed == wanted.tolist()


def groups_of(function):
    """Run a function on the groups of every rank of two hosts; return the results."""

    def on_rank(group):
        return function(group._backend._groups)

    return results([[0], [1, 2]], on_rank, connect=connect_over_tcp)


@pytest.mark.parametrize(
    ("blocks", "order"),
    [
        (1, ["before 0", "after 0"]),
        (2, ["before 0", "before 1", "after 0", "after 1"]),
        (3, ["before 0", "before 1", "after 0", "before 2", "after 1", "after 2"]),
    ],
)
def test_the_order_of_the_pipeline_is_the_same_on_a_rail_or_not(blocks, order):
    def phases(groups):
        done, sent = [], []
        groups.run_pipeline(
            blocks,
            lambda number: done.append(f"before {number}"),
            sent.append,
            lambda number: done.append(f"after {number}"),
        )
        return done, sent

    for rank, (done, sent) in enumerate(groups_of(phases)):
        assert sent == (list(range(blocks)) if rank < 2 else [])
        assert done == order


def test_an_error_of_the_network_is_raised_where_it_is_waited_for():
    def fail(groups):
        def network(number):
            if number == 1:
                raise ValueError(f"block {number}")

        try:
            groups.run_pipeline(3, no_phase, network, no_phase)
        except ValueError as error:
            return str(error)
        return "nothing"

    assert groups_of(fail) == ["block 1", "block 1", "nothing"]


def test_the_network_thread_ends_with_the_group():
    def thread(groups):
        found = []
        groups.start_on_network_thread(lambda: found.append(threading.current_thread())).wait()
        return found[0]

    for each in groups_of(thread):
        each.join(3)  # less than the time after which it would end unasked
        assert not each.is_alive()


def test_subgroups_that_span_hosts_unevenly(on_ranks):
    """Hosts of 2 and 3 ranks, and groups in them: 1 + 3, 2 + 1, 1 + 1, one host, out of order."""
    host_ids = ["a", "a", "b", "b", "b"]

    def connect(config):
        return GlooBackend.connect(replace(config, host_id=host_ids[config.rank]))

    def work(group):
        types = []
        for ranks in ([0, 2, 3, 4], [4, 1, 0], [1, 3], [4, 2, 3]):
            if group.rank not in ranks:
                continue
            part = group.subgroup(ranks)
            for size in (3, 200_000):  # through leaders, and in slices
                total = part.all_reduce(np.full(size, float(group.rank)))
                assert (total == sum(ranks)).all()
                gathered = part.all_gather(np.full(size, float(group.rank)))
                assert (gathered.reshape(len(ranks), size) == np.array(ranks)[:, None]).all()
            types.append((ranks, type(part._backend._collectives).__name__))
        return types

    results = on_ranks(5, work, connect=connect)
    found = {str(ranks): kind for types in results.values() for ranks, kind in types}
    assert found == {
        "[0, 2, 3, 4]": "HierarchicalBackend",
        "[4, 1, 0]": "HierarchicalBackend",
        "[1, 3]": "TcpBackend",
        "[4, 2, 3]": "ShmBackend",
    }
