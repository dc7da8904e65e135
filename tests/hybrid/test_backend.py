"""HybridBackend: which part carries out which operation, and what all ranks learn when something goes wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import ferro
from ferro import Device
from ferro.collectives.label import Call
from ferro.collectives.reduction import reduction_for
from ferro.simulated import SimulatedBackend
from ferro_gloo.backend import GlooBackend
from ferro_hybrid import HybridBackend
from ferro_testing import run_ranks_outcomes

from .ranks import COLLECTIVES, TRANSFERS, DeviceArray, DeviceBackend, run, start

SUM = reduction_for("sum", np.dtype(np.float64), 2)


def soon():
    return time.monotonic() + 10.0


def caught(call):
    """Return what a call raises, by name, and its text."""
    try:
        call()
    except ferro.FerroError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def connect_three(config):
    """Connect a hybrid of a gloo for the CPU, a device backend and a gloo for transfers."""
    cpu, below, p2p = (
        GlooBackend.connect(replace(config, store=config.store.prefix(name))) for name in ("cpu", "cuda", "p2p")
    )
    return HybridBackend(collectives={"cpu": cpu, "cuda": DeviceBackend(below)}, p2p=p2p)


# -- who is asked --------------------------------------------------------------------------------


def call_everything(group):
    n, me = group.world_size, group.rank
    x = np.arange(n * 2.0) + me
    group.all_reduce(x)
    group.reduce(x, 1)
    group.broadcast(x)
    group.all_gather(x)
    group.gather(x)
    group.scatter(x)
    group.reduce_scatter(x)
    group.all_to_all(x)
    group.barrier()
    buffer = np.empty_like(x)
    group.sendrecv(x, buffer, (me + 1) % n, (me - 1) % n)
    if me == 0:
        group.send(x, 1)
    elif me == 1:
        group.recv(buffer, 0)
    backend = group.backend
    return [set(part.asked) for part in (backend.collectives[Device.CPU], backend.p2p)]


def test_each_operation_goes_to_its_part():
    for rank, (collectives, p2p) in enumerate(run(2, call_everything)):
        assert collectives == set(COLLECTIVES) - {"barrier"}
        assert p2p == {"barrier", "exchange", TRANSFERS[rank]}


def interleave(group):
    """Make calls of all kinds in a mixed order, many of them outstanding."""
    n, me = group.world_size, group.rank
    works, wanted = [], []
    for number in range(40):
        x = np.full(number * 50 + 1, float(number + me))
        works.append(group.all_reduce(x, async_op=True))
        wanted.append(n * number + n * (n - 1) / 2)
        if number % 3 == 0:
            group.barrier()
        if number % 5 == 0:
            buffer = np.empty_like(x)
            group.sendrecv(x, buffer, (me + 1) % n, (me - 1) % n, tag=number)
            assert (buffer == number + (me - 1) % n).all()
        if number % 7 == 0:
            works.append(group.barrier(async_op=True))
            wanted.append(None)
    found = [work.wait() for work in works]
    return [None if x is None else float(x[-1]) for x in found] == wanted


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_that_see_some_of_the_numbers_keep_in_step(ranks):
    assert run(ranks, interleave) == [True] * ranks


def reduce_on_devices(group):
    """Reduce on the CPU and on the device in turns."""
    backend, totals = group.backend, []
    for seq in range(10):
        x = np.full(3, float(seq))
        backend.agree(Call("all_reduce", seq, "float64", 3), deadline=soon())
        backend.all_reduce(DeviceArray(x) if seq % 2 else x, SUM, deadline=soon())
        totals.append(float(x[0]))
    return totals, dict(backend.collectives[Device.CUDA].asked)


def test_arrays_on_a_device_go_to_its_backend_and_others_do_not():
    for totals, asked in run(2, reduce_on_devices, connect_three):
        assert asked == {"all_reduce": 5}
        assert totals == [2.0 * seq for seq in range(10)]


def scatter_from(group, on_device):
    """Scatter from rank 1; away from it a block is NumPy's, wherever the root's array is."""
    backend, me = group.backend, group.rank
    block, source = np.empty(2), None
    given = block
    if me == 1:
        source = np.arange(4.0)
        if on_device:
            source, given = DeviceArray(source), DeviceArray(block)
    call = Call("scatter", 0, "float64", 4, root=1)
    backend.agree(call, deadline=soon())
    backend.scatter(given, source, (2, 2), 1, deadline=soon())
    return block.tolist(), backend.collectives[Device.CUDA].asked["scatter"]


@pytest.mark.parametrize("on_device", [False, True])
def test_a_scatter_goes_where_the_roots_array_is(on_device):
    found = run(2, partial(scatter_from, on_device=on_device), connect_three)
    assert found == [([0.0, 1.0], on_device), ([2.0, 3.0], on_device)]


def test_devices_streams_and_labels_are_those_of_the_parts():
    def look(group):
        backend = group.backend
        return backend.devices, backend.streams, backend.labels_frames

    [found] = run(1, look, connect_three)
    assert found == ((Device.CPU, Device.CUDA), (Device.CUDA,), True)
    [found] = run(1, look)
    assert found == ((Device.CPU,), (), True)


def look_at_launches(group):
    """What `launched` says depends on what this thread did last."""
    backend = group.backend
    queued = backend.collectives[Device.CUDA].queued
    elsewhere = []

    def on_device():
        backend.agree(Call("all_reduce", 1), deadline=soon())
        backend.all_reduce(DeviceArray(np.ones(2)), SUM, deadline=soon())
        elsewhere.append(backend.launched() is queued)

    backend.agree(Call("all_reduce", 0), deadline=soon())
    backend.all_reduce(np.ones(2), SUM, deadline=soon())
    thread = threading.Thread(target=on_device)
    thread.start()
    thread.join()
    here = backend.launched()
    here.wait()
    return elsewhere, here.done(), queued.waits


def test_a_launch_is_that_of_the_thread_that_asks():
    assert run(1, look_at_launches, connect_three) == [([True], True, 0)]


# -- transfers between devices -------------------------------------------------------------------


def swap_mixed(group):
    """Send from the CPU and receive on the device, at the same time, and the other way round."""
    backend, me = group.backend, group.rank
    peer = 1 - me
    mine, theirs = np.full(4, float(me)), np.empty(4)
    if me == 0:
        device = DeviceArray(theirs)
        backend.exchange([(peer, mine)], [(peer, device)], tag=3, deadline=soon())
        return device.host.tolist(), backend.collectives[Device.CUDA].queued.waits
    backend.exchange([(peer, DeviceArray(mine))], [(peer, theirs)], tag=3, deadline=soon())
    return theirs.tolist(), backend.collectives[Device.CUDA].queued.waits


def test_an_exchange_between_devices_goes_through_both_and_is_waited_for():
    assert run(2, swap_mixed, connect_three) == [([1.0] * 4, 1), ([0.0] * 4, 1)]


def pass_on(group, sent, expected):
    backend = group.backend
    if group.rank == 0:
        backend.send(sent, 1, tag=2, deadline=soon())
        return None
    return caught(lambda: backend.recv(expected, 0, tag=2, deadline=soon()))


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (DeviceArray(np.ones(3)), DeviceArray(np.ones(4))),
        (DeviceArray(np.ones(3)), DeviceArray(np.ones(3, np.int64))),
        (DeviceArray(np.ones(3)), np.ones(3)),
        (np.ones(3), DeviceArray(np.ones(3))),
        (np.ones(3), np.ones(4)),
    ],
    ids=["size", "dtype", "from a device", "to a device", "on the CPU"],
)
def test_ends_of_a_transfer_that_differ_learn_of_it(sent, expected):
    _, (kind, text) = run(2, partial(pass_on, sent=sent, expected=expected), connect_three)
    assert kind == "CollectiveMismatch"
    assert "rank 1 called recv(" in text
    assert "rank 0 called send(" in text


def test_a_good_transfer_on_a_device_arrives():
    def transfer(group):
        x = DeviceArray(np.full(5, 7.0 * (1 - group.rank)))
        found = pass_on(group, x, x)
        return found, float(x.host[-1]), dict(group.backend.collectives[Device.CUDA].asked)

    assert run(2, transfer, connect_three) == [(None, 7.0, {"send": 1}), (("nothing", ""), 7.0, {"recv": 1})]


# -- groups --------------------------------------------------------------------------------------


def make_groups(group):
    pair = group.subgroup([group.world_size - 1, 0]) if group.rank != 1 else None
    halves = group.split(group.rank % 2)
    routed = all(
        made.backend.collectives[Device.CPU] is not made.backend.p2p for made in (pair, halves) if made is not None
    )
    if pair is not None:
        buffer = np.empty(1)
        pair.sendrecv(np.array([float(pair.rank)]), buffer, 1 - pair.rank)
        routed = routed and buffer[0] == 1 - pair.rank
    return routed, halves.all_gather(np.array(group.rank)).tolist()


def test_groups_within_have_the_same_routes():
    assert run(3, make_groups) == [(True, [0, 2]), (True, [1]), (True, [0, 2])]


def die_and_go_on(group):
    """Rank 1 leaves with an error; the others go on, with both parts."""
    group.all_reduce(np.ones(1))
    group.barrier()
    if group.rank == 1:
        raise ZeroDivisionError
    kind, _ = caught(lambda: group.all_reduce(np.ones(1)))
    small = group.shrink(timeout_s=5)
    buffer = np.empty(1)
    small.sendrecv(np.array([float(group.rank)]), buffer, 1 - small.rank)
    small.barrier()
    return kind, float(small.all_reduce(np.ones(1))[0]), float(buffer[0])


def test_the_survivors_go_on_in_both_parts():
    ranks = start(3, die_and_go_on)
    assert type(ranks.errors.pop(1)) is ZeroDivisionError
    assert not ranks.errors
    assert ranks.results == {0: ("PeerLost", 2.0, 2.0), 2: ("PeerLost", 2.0, 0.0)}


def killed_and_go_on(group):
    group.barrier()
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    kind, _ = caught(group.barrier)
    return [kind, float(group.shrink(timeout_s=10).all_reduce(np.ones(1))[0])]


def test_a_killed_process_is_gone_for_a_map_as_well():
    outcomes = run_ranks_outcomes(killed_and_go_on, 3, backend="cpu:gloo", timeout_s=30)
    assert outcomes[1].signal == "SIGKILL"
    assert [outcomes[rank].result for rank in (0, 2)] == [["PeerLost", 2.0]] * 2, outcomes


def test_shrink_says_which_part_cannot():
    class Mortal(SimulatedBackend):
        def shrink(self, ranks, context):
            raise ferro.UnsupportedError("Mortal cannot go on")

    [good] = SimulatedBackend.create_group(1)
    [bad] = Mortal.create_group(1)
    with pytest.raises(ferro.UnsupportedError, match="Mortal"):
        HybridBackend(collectives=bad, p2p=good).shrink([0], 1)


# -- failing -------------------------------------------------------------------------------------


def abort_while_waiting(group):
    """Abort while rank 1 waits in one part and rank 2 in the other, or still in the barrier."""
    if group.rank == 0:
        group.barrier()
        group.abort()
        return caught(group.barrier)

    def wait():
        group.barrier()
        if group.rank == 1:
            group.recv(np.empty(1), 0)
        group.all_reduce(np.ones(1))

    return caught(wait)


def test_abort_wakes_those_who_wait_in_any_part():
    assert [kind for kind, _ in run(3, abort_while_waiting)] == ["GroupClosed"] * 3


def call_by_number(group):
    """Rank 1 comes to a part with the next call of the group, which looks the same."""
    backend = group.backend
    call = Call("all_reduce", seq=4 + group.rank, dtype="float64", count=2, detail="shape 2")
    backend.agree(call, deadline=soon())
    return caught(lambda: backend.all_reduce(np.ones(2), SUM, deadline=soon()))


def test_calls_that_look_the_same_but_are_not_differ():
    for kind, text in run(2, call_by_number):
        assert kind == "CollectiveMismatch"
        assert "#4 shape 2" in text
        assert "#5 shape 2" in text


def wait_in_different_parts(group):
    if group.rank == 0:
        return caught(lambda: group.all_reduce(np.ones(1), timeout_s=0.3))
    return caught(lambda: group.barrier(timeout_s=0.3))


def test_ranks_that_wait_in_different_parts_learn_of_it_by_the_deadline():
    found = run(2, wait_in_different_parts)
    assert [kind for kind, _ in found] == ["CollectiveTimeout"] * 2
    assert found[0][1] == found[1][1]
    assert "which was in" in found[0][1]


class Noisy(SimulatedBackend):
    """Cannot end without an error."""

    ended = 0

    def close(self):
        self.ended += 1
        raise OSError("close of a part")

    def abort(self):
        self.ended += 1
        raise OSError("abort of a part")


@pytest.mark.parametrize("end", ["close", "abort"])
def test_every_part_is_ended_even_if_one_cannot(end):
    parts = [Noisy.create_group(1)[0] for _ in range(2)]
    backend = HybridBackend(collectives=parts[0], p2p=parts[1])
    with pytest.raises(OSError, match=f"{end} of a part"):
        getattr(backend, end)()
    assert [part.ended for part in parts] == [1, 1]


def test_close_may_be_called_twice():
    def close_twice(group):
        group.backend.close()
        group.backend.close()

    assert run(1, close_twice) == [None]


# -- what does not fit together ------------------------------------------------------------------


def test_memory_is_that_of_the_collectives_on_the_cpu():
    class Generous(SimulatedBackend):
        def allocate(self, nbytes):
            return np.full(nbytes, 7, np.uint8)

    [plain], [generous] = SimulatedBackend.create_group(1), Generous.create_group(1)
    backend = HybridBackend(collectives={Device.CPU: generous}, p2p=plain)
    assert backend.allocate(3).tolist() == [7, 7, 7]


def test_collectives_on_the_cpu_are_p2ps_where_none_is_given():
    [cpu], [below] = SimulatedBackend.create_group(1), SimulatedBackend.create_group(1)
    device = DeviceBackend(below)
    backend = HybridBackend(collectives=device, p2p=cpu)
    assert dict(backend.collectives) == {Device.CPU: cpu, Device.CUDA: device}
    assert backend.p2p is cpu


def test_parts_of_different_groups_are_refused():
    two, [one] = SimulatedBackend.create_group(2), SimulatedBackend.create_group(1)
    with pytest.raises(ferro.UsageError, match=r"rank 1 of 2, SimulatedBackend \(p2p\) is rank 0 "):
        HybridBackend(collectives=two[1], p2p=two[0])
    with pytest.raises(ferro.UsageError, match=r"rank 0 of 1, .* is rank 0 of 2"):
        HybridBackend(collectives=one, p2p=two[0])


def test_parts_that_do_not_take_the_arrays_are_refused():
    [cpu], [below] = SimulatedBackend.create_group(1), SimulatedBackend.create_group(1)
    device = DeviceBackend(below)
    with pytest.raises(ferro.UsageError, match="must take arrays on cpu"):
        HybridBackend(collectives=cpu, p2p=device)
    with pytest.raises(ferro.UsageError, match=r"DeviceBackend cannot .* on cpu: it takes .* cuda"):
        HybridBackend(collectives={"cpu": device}, p2p=cpu)
    with pytest.raises(ferro.UsageError, match="no device 'gpu'"):
        HybridBackend(collectives={"gpu": device}, p2p=cpu)
