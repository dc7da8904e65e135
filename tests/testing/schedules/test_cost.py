"""The cost model gives the closed forms of the literature, and grows with what it should."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro.collectives.direct import (
    direct_all_gather,
    direct_gather,
    direct_reduce,
    exchange_all_reduce,
    pairwise_all_to_all,
)
from ferro.collectives.network import Network
from ferro.collectives.ring import ring_all_reduce
from ferro.collectives.schedule import Recv, Round, Schedule
from ferro.collectives.tree import dissemination_barrier, scatter_ring_broadcast, tree_broadcast, tree_scatter
from ferro.errors import PluginError, UsageError
from ferro_testing.schedules import cost_s

L, B, M = 1e-5, 1e9, 1 << 20
NETWORK = Network(L, B)


@pytest.mark.parametrize("n", [2, 3, 8, 64, 1024])
def test_closed_forms(n):
    log = math.ceil(math.log2(n))

    def seconds(build, root=0):
        return pytest.approx(cost_s(build, n, M, NETWORK, root))

    assert 2 * (n - 1) * (L + M / n / B) == seconds(ring_all_reduce)
    assert (n - 1) * (L + M / n**2 / B) == seconds(pairwise_all_to_all)
    assert log * L == seconds(dissemination_barrier)
    assert L + (n - 1) * M / B == seconds(exchange_all_reduce)
    assert L + (n - 1) * M / n / B == seconds(direct_all_gather)
    assert L + (n - 1) * M / n / B == seconds(direct_gather, root=n // 2)


@pytest.mark.parametrize("n", [2, 8, 64, 1024])
@pytest.mark.parametrize("at", [0, 0.5])
def test_closed_forms_of_trees_of_a_power_of_two(n, at):
    root, log = int(n * at), int(math.log2(n))
    assert cost_s(tree_broadcast, n, M, NETWORK, root) == pytest.approx(log * (L + M / B))
    scatter = log * L + (n - 1) * M / n / B
    assert cost_s(tree_scatter, n, M, NETWORK, root) == pytest.approx(scatter)


def test_world_of_one_costs_nothing():
    assert cost_s(ring_all_reduce, 1, M, NETWORK) == 0


def test_overhead_and_arithmetic():
    n, o, rate = 5, 1e-6, 2e9
    network = Network(L, B, overhead_s=o, reduce_bytes_per_s=rate)
    ring = 2 * (n - 1) * (2 * o + L + M / n / B) + (n - 1) * M / n / rate
    assert cost_s(ring_all_reduce, n, M, network) == pytest.approx(ring)
    # The root combines what came while the next comes in: only the last is not hidden.
    reduce = o + L + (n - 1) * (M / B + o) + M / rate
    assert cost_s(direct_reduce, n, M, network) == pytest.approx(reduce)


def between(hosts):
    return Network(L, B, hosts=hosts, inter_host_latency_s=10 * L, inter_host_bandwidth_bytes_per_s=B / 10)


def test_ring_over_hosts():
    one = cost_s(ring_all_reduce, 8, M, NETWORK)
    assert cost_s(ring_all_reduce, 8, M, between((5,) * 8)) == pytest.approx(one)
    # Every chunk must leave and enter hosts, so the slow links set the pace: nearly ten times.
    blocks = cost_s(ring_all_reduce, 8, M, between((0, 0, 0, 0, 1, 1, 1, 1)))
    scattered = cost_s(ring_all_reduce, 8, M, between((0, 1, 0, 1, 0, 1, 0, 1)))
    assert one < blocks <= scattered == pytest.approx(10 * one)


@pytest.mark.parametrize("build", [ring_all_reduce, exchange_all_reduce, dissemination_barrier])
def test_shortcut_by_symmetry_changes_nothing(build):
    def unlike(rank, world_size, root):
        """The same, but with an empty round on one rank: it costs nothing, and hides the shift."""
        schedule = build(rank, world_size, root)
        return Schedule(schedule.chunks, schedule.rounds + (Round(),) * (rank == 1))

    hosts = (0, 0, 0, 1, 1, 1, 2, 2, 2)
    for network in (NETWORK, between(hosts)):
        whole = cost_s(unlike, 9, M, network)
        assert cost_s(build, 9, M, network) == pytest.approx(whole)


def test_the_model_chooses_as_people_do():
    def best(nbytes):
        builds = (tree_broadcast, scatter_ring_broadcast)
        return min(builds, key=lambda build: cost_s(build, 16, nbytes, NETWORK))

    assert best(8) is tree_broadcast
    assert best(1 << 26) is scatter_ring_broadcast


BUILDS = st.sampled_from([ring_all_reduce, tree_broadcast, scatter_ring_broadcast, direct_reduce])
FACTORS = st.floats(1, 10)


@settings(deadline=None)
@given(BUILDS, st.integers(1, 12), st.integers(0, M), FACTORS, FACTORS, FACTORS)
def test_never_cheaper_with_more_bytes_or_a_worse_network(build, n, nbytes, a, b, c):
    least = cost_s(build, n, nbytes, NETWORK)
    assert least <= cost_s(build, n, int(nbytes * a), NETWORK) * (1 + 1e-9)
    worse = Network(L * b, B / c, overhead_s=b * 1e-6, reduce_bytes_per_s=1e9)
    assert least <= cost_s(build, n, nbytes, worse) * (1 + 1e-9)


def test_ranks_that_wait_for_ever():
    def stuck(rank, world_size, root):
        return Schedule(1, (Round(recvs=(Recv(1 - rank, (0,)),)),))

    with pytest.raises(PluginError, match="waits for ever for rank"):
        cost_s(stuck, 2, M, NETWORK)


def test_arguments_out_of_range():
    with pytest.raises(UsageError, match="rates above 0"):
        Network(L, 0)
    with pytest.raises(UsageError, match="times of 0 or more"):
        Network(-L, B)
    with pytest.raises(UsageError, match="one host for every rank"):
        cost_s(ring_all_reduce, 3, M, between((0, 1)))
    with pytest.raises(UsageError, match="nbytes of 0 or more"):
        cost_s(ring_all_reduce, 3, -1, NETWORK)
    with pytest.raises(UsageError, match="root is 3"):
        cost_s(tree_broadcast, 3, M, NETWORK, root=3)
