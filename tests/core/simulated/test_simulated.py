"""The simulated backend conforms, and its faults and virtual clocks do what they say."""

import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

import ferro
from ferro.collectives.network import Network
from ferro.errors import CollectiveTimeout, PeerLost, UsageError
from ferro.simulated import Fault, SimulatedBackend, simulate
from ferro_testing.conformance import CHECKS, Case, check_random_reductions

CASE = Case(backend="simulated", world_sizes=(1, 2, 3, 4, 5))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_simulated_backend_conforms(check):
    check(CASE)


def test_random_reductions_are_numpys():
    check_random_reductions(
        replace(CASE, world_sizes=(2, 3, 7)), seed=1, runs=int(os.environ.get("FERRO_FUZZ_RUNS", "15"))
    )


def test_results_are_returned_by_rank():
    assert simulate(lambda group: (group.rank, group.world_size), 3) == [(0, 3), (1, 3), (2, 3)]


def test_a_world_of_no_ranks_is_refused():
    with pytest.raises(UsageError, match="world_size must be at least 1"):
        simulate(lambda group: None, 0)


def test_the_first_cause_is_raised_with_a_line_for_the_others():
    def fail(group):
        if group.rank == 1:
            raise KeyError("the cause")
        if group.rank == 5:
            raise OSError("another") from None
        try:
            group.barrier()
        except ferro.PeerLost as error:
            if group.rank == 4:
                raise ValueError("made of it") from error
            raise

    with pytest.raises((KeyError, OSError)) as caught:
        simulate(fail, 8, timeout_s=5)
    first, *others = caught.value.__notes__
    cause, other = (1, 5) if isinstance(caught.value, KeyError) else (5, 1)
    assert first == f"(raised on rank {cause} of the simulation)"
    assert len(others) == 3
    own, *followed = others
    assert own.startswith(f"rank {other}, {__file__}:")
    assert sorted(line.partition(",")[0] for line in followed) == ["rank 4", "ranks 0"]
    [line] = [line for line in followed if line.startswith("ranks 0")]
    assert line.startswith(f"ranks 0, 2, 3, 6, 7, {__file__}:")
    assert ": PeerLost: " in line
    assert "barrier #0 on group 'world'" in line


@pytest.mark.parametrize("after", [0, 1, 5, 12])
def test_a_killed_rank_is_named_on_all_others_with_one_cause(after):
    errors = {}

    def work(group):
        try:
            for _ in range(20):
                group.all_reduce(np.ones(100))
        except ferro.FerroError as error:
            errors[group.rank] = error

    results = simulate(work, 4, faults=[Fault(rank=2, after=after)], timeout_s=5)
    assert results == [None] * 4
    assert sorted(errors) == [0, 1, 3]
    assert {type(error) for error in errors.values()} == {PeerLost}
    assert {error.peer for error in errors.values()} == {2}
    assert len({str(error) for error in errors.values()}) == 1


def test_a_dropped_message_is_a_timeout_that_says_that_all_were_there():
    errors = []

    def work(group):
        try:
            group.all_reduce(np.ones(3), timeout_s=0.3)
        except CollectiveTimeout as error:
            errors.append(error)

    simulate(work, 2, faults=[Fault(rank=rank, after=1, kind="drop") for rank in (0, 1)])
    assert len(errors) == 2
    assert all(error.missing == () and error.arrived == (0, 1) for error in errors)
    assert "all ranks were there" in str(errors[0])


def test_clocks_advance_by_latency_size_and_delay():
    network = Network(latency_s=0.5, bandwidth_bytes_per_s=1000.0)

    def clocks(faults):
        backends = SimulatedBackend.create_group(2, network=network, faults=faults)
        backends[0].send(np.zeros(500, np.uint8), 1, tag=1, deadline=0.0)
        backends[1].recv(np.zeros(500, np.uint8), 0, tag=1, deadline=time.monotonic() + 5)
        return [backend.clock_s for backend in backends]

    assert clocks([]) == [0.0, pytest.approx(1.0)]
    late = [Fault(rank=0, after=0, kind="delay", seconds=2.0)]
    assert clocks(late) == [0.0, pytest.approx(3.0)]


def test_a_step_of_a_persistent_operation_has_no_messages_but_its_own():
    network = Network(latency_s=1.0, bandwidth_bytes_per_s=1e9)

    def work(group):
        x = np.ones(4)
        clocks = [group.backend.clock_s]
        group.all_reduce(x)
        clocks.append(group.backend.clock_s)
        step = group.persistent("all_reduce", x)
        clocks.append(group.backend.clock_s)
        step()
        clocks.append(group.backend.clock_s)
        return clocks[1] - clocks[0], clocks[3] - clocks[2]

    for ordinary, step in simulate(work, 2, network=network, timeout_s=5, run_timeout_s=20):
        assert (round(ordinary), round(step)) == (2, 1)


def test_messages_that_were_taken_leave_nothing_behind():
    backends = SimulatedBackend.create_group(2)
    for tag in range(10):
        backends[0].send(np.zeros(8), 1, tag=tag, deadline=0.0)
        backends[1].recv(np.zeros(8), 0, tag=tag, deadline=time.monotonic() + 5)
    assert not backends[0].transport._queues


def test_a_run_that_does_not_end_is_a_timeout_that_names_the_rank():
    forever = threading.Event()

    def hang(group):
        if group.rank == 1:
            forever.wait(30)

    with pytest.raises(CollectiveTimeout, match=r"ranks \[1\] are still running"):
        simulate(hang, 2, run_timeout_s=0.1)
    forever.set()


def test_closing_a_subgroup_leaves_the_rank_in_the_world():
    def work(group):
        for _ in range(3):
            with group.subgroup(range(group.world_size)) as inner:
                inner.barrier()
        return group.all_reduce(1)

    assert simulate(work, 3) == [3, 3, 3]


def test_init_in_a_simulated_rank_returns_its_group():
    def program(group):
        with ferro.init() as world:
            assert world is group
            with pytest.raises(ferro.UsageError, match="leave rank= and world_size= out"):
                ferro.init(rank=0, world_size=1)
            return int(world.all_reduce(1))

    assert ferro.simulate(program, 3) == [3, 3, 3]


def test_an_interrupt_ends_all_ranks():
    started, steps = threading.Barrier(3), [0, 0]

    def loop(group):
        started.wait(10)
        while True:
            group.all_reduce(1)
            steps[group.rank] += 1

    def interrupt():
        started.wait(10)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            ferro.simulate(loop, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 10
    while any(thread.name in ("rank 0", "rank 1") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("arguments", [(2, print), (print, "2"), (print, 1.5)])
def test_arguments_in_the_wrong_order_or_of_another_type_are_refused(arguments):
    with pytest.raises(ferro.UsageError, match="simulate takes a function and a number of ranks"):
        ferro.simulate(*arguments)
