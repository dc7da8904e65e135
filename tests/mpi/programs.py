"""The functions that ranks run in these tests; their interpreter may have no pytest."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from unittest.mock import patch

import numpy as np

import ferro
from ferro_testing.samples import dtype_of


def native_and_gathered(group):
    """Reduce natively and by gathered contributions: the results are NumPy's on all ranks."""
    group.backend._share_bytes = 0
    n, found = group.world_size, []
    nan = np.array([np.nan, -0.0, 1.0]) if group.rank == n - 1 else np.array([1.0, 0.0, np.nan])
    for op in ("min", "max"):
        found.append(group.all_reduce(nan, op).tobytes())
    huge = np.array([np.inf + 1j])
    with np.errstate(invalid="ignore"):
        wanted = functools.reduce(np.multiply, [huge] * n)
        found.append(group.all_reduce(huge, "prod").tobytes() == wanted.tobytes())
    ones = np.full(3000, 1 + 2**-9, np.float16)  # its float16 sums are rounded at each step
    exact = (np.float32(1 + 2**-9) * n).astype(np.float16)
    found.append(bool((group.all_reduce(ones) == exact).all()))
    return found


def cut(group):
    """Let MPI count to 1000 only, and move more than that by every collective."""
    group.backend.largest = 1000
    group.backend._share_bytes = 0
    n, me, found = group.world_size, group.rank, {}
    big = np.arange(3001.0) + me
    total = sum(np.arange(3001.0) + r for r in range(n))
    found["all_reduce"] = (group.all_reduce(big) == total).all()
    result = group.reduce(big, 1)
    found["reduce"] = me != 1 or (result == total).all()
    found["broadcast"] = (group.broadcast(big, 1) == np.arange(3001.0) + 1).all()
    every = np.concatenate([np.arange(3001.0) + r for r in range(n)])
    found["all_gather"] = (group.all_gather(big) == every).all()
    result = group.gather(big, 1)
    found["gather"] = me != 1 or (result == every).all()
    mine = group.scatter(every if me == 1 else None, 1)
    found["scatter"] = (mine == np.arange(3001.0) + me).all()
    result = group.reduce_scatter(every)
    found["reduce_scatter"] = (result == n * (np.arange(3001.0) + me)).all()
    result = group.all_to_all(np.repeat(np.arange(float(n)), 700))
    found["all_to_all"] = (result == me).all()
    sizes = [5000 if (me, rank) == (0, n - 1) else 1 for rank in range(n)]  # only one is large
    result = group.all_to_all(np.full(sum(sizes), me), send_sizes=sizes)
    found["uneven all_to_all"] = result.size == (5000 + n - 1 if me == n - 1 else n)
    return [name for name, good in found.items() if not good]


def cut_messages(group):
    """Cut transfers after 1000 bytes."""
    from ferro_mpi import communicator

    given, taken = np.arange(1001.0), np.empty(1001)
    with patch.object(communicator, "_MESSAGE_BYTES", 1000):
        group.sendrecv(given, taken, (group.rank + 1) % 2)
    return bool((given == taken).all())


def large_tag(group):
    """Send with the largest tag that ferro allows and MPI may not."""
    try:
        if group.rank == 0:
            group.send(np.ones(2), 1, 2**31 - 1)
        else:
            group.recv(np.empty(2), 0, 2**31 - 1)
    except ferro.UnsupportedError as error:
        return [str(error), int(group.all_reduce(1))]
    return ["", int(group.all_reduce(1))]


def temporaries(group):
    """Issue operations on arrays that the caller does not keep."""
    works = [group.all_reduce(np.full(50_000, float(i)), async_op=True) for i in range(20)]
    works += [group.all_gather(np.full(9_000, float(i)), async_op=True) for i in range(20)]
    junk = [np.full(50_000, -1.0) for _ in range(20)]  # into memory that was given back too soon
    n = group.world_size
    good = all((works[i].wait() == n * i).all() for i in range(20))
    return good and all((works[20 + i].wait() == i).all() for i in range(20)) and len(junk) == 20


def two_groups(group):
    """Use two groups in two threads at once."""
    halves = [group.subgroup(range(group.world_size), name=str(i)) for i in range(2)]
    sums = [0.0, 0.0]

    def work(i):
        for k in range(100):
            sums[i] += float(halves[i].all_reduce(np.full(k * i + 1, 1.0))[0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sums


def many_groups(group):
    """Make more groups than MPI has communicators left at a time; close some, and drop the others."""
    from ferro_mpi.mpi import MPI

    taken = []
    with contextlib.suppress(MPI.Exception):
        while len(taken) < 10_000:
            taken.append(MPI.COMM_SELF.Dup())
    assert len(taken) < 10_000, "this MPI has more communicators than the test can take"
    for _ in range(600):
        taken.pop().Free()
    for k in range(350):  # each group has two communicators
        part = group.split(group.rank % 2)
        if k % 8 == 0:
            part.close()
    for comm in taken:
        comm.Free()
    return int(group.all_reduce(1))


def refuse(a, b, out):
    """Refuse as a reduction, on the last rank only."""
    if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
        raise ArithmeticError("not these numbers")
    np.add(a, b, out)


def failing_function(group, count):
    """Reduce by a function that raises on one rank."""
    try:
        for _ in range(2):  # a small call may have ended on the others
            group.all_reduce(np.ones(count), refuse)
    except (ferro.FerroError, ArithmeticError) as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def fixed(group):
    """Use an algorithm of the user's choice for one collective, MPI's for another."""
    return [group.all_reduce(np.arange(5.0)).tolist(), group.all_gather(group.rank).tolist()]


def by_messages(group):
    """Use a group whose ranks share no memory, as on several hosts."""
    from ferro_mpi import communicator

    with patch.object(communicator, "open_group_memory", lambda comm: None):
        apart = group.subgroup(range(group.world_size))
    n, me = group.world_size, group.rank
    found = [apart.all_reduce(np.full(3, me)).tolist() == [n * (n - 1) / 2] * 3]
    found.append(apart.all_gather(me, async_op=True).wait().tolist() == list(range(n)))
    found.append(apart.all_reduce(np.ones(4, np.float16)).tolist() == [n] * 4)
    apart.barrier()
    try:
        apart.all_reduce(np.ones(3 if me else 4))
    except ferro.CollectiveMismatch as error:
        found.append("4 x float64" in str(error) and "3 x float64" in str(error))
    return found


def late_by_messages(group):
    """Stay away from a collective of ranks that share no memory."""
    from ferro_mpi import communicator

    with patch.object(communicator, "open_group_memory", lambda comm: None):
        apart = group.subgroup(range(group.world_size))
    if group.rank == 1:
        group.barrier()
        return "away"
    try:
        apart.all_reduce(np.ones(3), timeout_s=0.3)
    except ferro.CollectiveTimeout as error:
        group.barrier()
        return str(error)
    return "nothing"


def absent_member(group):
    """Make a group that one of its members does not make."""
    if group.rank == 1:
        group.barrier()
        return "away"
    group.backend._communicator.timeout_s = 0.3
    try:
        group.subgroup([0, 1])
    except ferro.RendezvousError as error:
        group.barrier()
        return str(error)
    return "nothing"


def shrink_twice(group):
    """Lose the last rank, twice, first in a collective and then in waiting for its message; go on with the others."""
    sizes = []
    for _ in range(2):
        group.all_reduce(np.ones(3))
        last = group.world_size - 1
        if group.rank == last:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            if last == 2:
                group.recv(np.empty(3), last)
            for _ in range(2):
                group.all_reduce(np.ones(3))
        except ferro.PeerLost as error:
            sizes.append(error.peer)
        group = group.shrink(timeout_s=5.0)
        sizes.append(int(group.all_reduce(1)))
    return sizes


def dtypes(group):
    """Reduce many numbers of both kinds of half precision, in place."""
    found = []
    for name in ("float16", "bfloat16"):
        big = np.ones(1_000_003, dtype_of(name))
        group.all_reduce(big, out=big)
        found.append(bool((big == group.world_size).all()))
    return found


def leave(group):
    """Leave without a message that rank 0 waits for, after one that it can have."""
    if group.rank == 1:
        group.send(np.arange(5.0), 0)
        return True
    got = group.recv(np.empty(5), 1)
    try:
        group.recv(np.empty(5), 1)
    except ferro.PeerLost as error:
        return got.tolist() == [0, 1, 2, 3, 4] and error.peer == 1
    return False


def late(group):
    """Come to collectives of several groups after the other rank has given up, at its deadline or by an abort."""
    is_late, outcomes = group.rank == 1, {}

    def prepare(count, how):
        part = group.subgroup(range(2))
        part.barrier()

        def run():
            if how == "abort" and not is_late:
                threading.Timer(0.2, part.abort).start()
            try:
                part.all_reduce(np.ones(count), timeout_s=0.3 if how == "timeout" and not is_late else None)
            except ferro.FerroError as error:
                outcomes[f"{how} {count}"] = type(error).__name__

        return run

    # Shared operands, and MPI's own collective.
    runs = [prepare(count, how) for count in (3, 100_000) for how in ("timeout", "abort")]
    if is_late:
        group.barrier()
    threads = [threading.Thread(target=run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not is_late:
        group.barrier()
    return [outcomes, int(group.all_reduce(1))]


class Interrupt(BaseException):
    """A program's own exception, as a signal handler raises it."""


def interrupted(group):
    """Be interrupted between the agreement on a collective and MPI's part of it."""
    part = group.subgroup(range(2))
    part.backend._share_bytes = 0
    if group.rank == 0:
        agreement = part.backend._agreement
        agree = agreement.agree_on_blocking

        def agree_and_interrupt(*args):
            agree(*args)
            raise Interrupt

        agreement.agree_on_blocking = agree_and_interrupt
    outcome = "nothing"
    try:
        outcome = float(part.all_reduce(np.ones(5))[0])
    except Interrupt:
        part.abort()
    except ferro.GroupClosed:
        outcome = "closed"
    return [outcome, int(group.all_reduce(1))]


def mixed(group):
    """Wait for a collective at once on one rank, later on the other."""
    group.backend._share_bytes = 0
    found = []
    for count in (10, 200_000):
        result = group.all_reduce(np.ones(count), async_op=group.rank == 0)
        found.append(float((result.wait() if group.rank == 0 else result)[-1]))
    return found


def polls_in_threads(group):
    """Look for ended ranks in several threads at once."""
    memory, errors = group.backend._communicator.memory, []

    def poll():
        try:
            for _ in range(300):
                memory.ended_ranks()
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=poll) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def shrink_without_a_late_rank(group):
    """Lose rank 1, and go on without the last rank, which comes once the others have gone on."""
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(ferro.PeerLost):
        group.all_reduce(1)
    store = group._info.job_store
    if group.rank == group.world_size - 1:
        store.get("gone on", deadline=time.monotonic() + 30)
    try:
        rest = group.shrink(timeout_s=0.5)
    except ferro.RendezvousError as error:
        store.set("told", b"1")
        return "go on without it" in str(error)
    total = int(rest.all_reduce(1))
    if rest.rank == 0:
        store.set("gone on", b"1")
    store.get("told", deadline=time.monotonic() + 30)
    return total
