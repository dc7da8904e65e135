"""nccl on a real GPU: two processes, on two GPUs or on one.

NCCL 2.30.3 and later allow two processes on one GPU by a variable. Earlier ones must be told that
the processes are on different hosts, so that they use sockets. Each process then gets the GPU for
slices of time, which is slow.
"""

from __future__ import annotations

import numpy as np
import pytest

from ferro import CollectiveTimeout, FerroError, GroupClosed, backends
from ferro_testing import conformance, run_ranks
from ferro_testing.case import Case
from ferro_testing.ranks import run_ranks_outcomes
from ferro_testing.samples import DTYPES, noise, reduced, reductions, sample

pytestmark = pytest.mark.gpu

RUN_S = 120.0
DIFFERENCES = {"tags": "NCCL has none", "mismatch": "an option", "shrink": "CuPy has no ncclCommShrink"}
CHECKS = [check for check in conformance.CHECKS if check is not conformance.check_transfers]
# Spins on the GPU for so many cycles: a fraction of a second.
SPIN = """
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""
SPIN_CYCLES = 1_000_000_000


@pytest.fixture(autouse=True)
def usable():
    found = backends.available()["nccl"]
    if not found.ok:
        pytest.skip(f"nccl cannot be used here: {found.reason}")


def variables(rank):
    """Make the variables that let two processes share a GPU, where there is only one."""
    from cupy.cuda import nccl, runtime

    shared = {"NCCL_MAX_CTAS": "4", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    if runtime.getDeviceCount() > 1:
        return {}
    if nccl.get_version() < 23003:
        shared |= {"NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo"}
    return shared


def in_processes(function, world_size, args, *, timeout_s, deterministic):
    return run_ranks_outcomes(
        function,
        world_size,
        backend="nccl",
        args=args,
        timeout_s=timeout_s,
        init_options={"deterministic": deterministic},
        env=variables,
    )


def run(function, world_size=2, **options):
    return run_ranks(function, world_size, backend="nccl", timeout_s=RUN_S, env=variables, init_options=options)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_nccl_conforms(check):
    check(Case(backend="nccl", world_sizes=(1, 2), unsupported=DIFFERENCES, timeout_s=RUN_S, runner=in_processes))


def reduce_everything(group):
    import cupy

    wrong = []
    n, me = group.world_size, group.rank
    for dtype in DTYPES:
        for op in reductions(dtype):
            for shape in ((7,), (1000, 3), (0,), ()):
                wanted = reduced([sample(r, shape, dtype) for r in range(n)], op)
                x = cupy.asarray(sample(me, shape, dtype))
                found = cupy.asnumpy(group.all_reduce(x, op))
                if found.dtype != wanted.dtype or found.tobytes() != wanted.tobytes():
                    wrong.append(f"all_reduce {dtype}{shape} {op}")
            for sizes in (None, [6 - n + 1] + [1] * (n - 1)):
                if sizes is None and 6 % n:
                    continue
                rows = sizes or [6 // n] * n
                whole = reduced([sample(r, (6, 5), dtype) for r in range(n)], op)
                part = whole[sum(rows[:me]) : sum(rows[: me + 1])]
                x = cupy.asarray(sample(me, (6, 5), dtype))
                found = cupy.asnumpy(group.reduce_scatter(x, op, sizes=sizes))
                if found.tobytes() != part.tobytes():
                    wrong.append(f"reduce_scatter {dtype} {op} {sizes}")
    return wrong


@pytest.mark.parametrize("world_size", [1, 2])
def test_reductions_of_gpu_arrays(world_size):
    assert run(reduce_everything, world_size) == [[]] * world_size


def reduce_in_order(group):
    import cupy

    wrong = []
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        for count in (10, 300_000):
            everyones = [noise(rank, count, dtype) for rank in range(group.world_size)]
            for op in ("sum", "mean"):
                found = cupy.asnumpy(group.all_reduce(cupy.asarray(everyones[group.rank]), op))
                if found.tobytes() != reduced(everyones, op).tobytes():
                    wrong.append(f"{dtype} {count} {op}")
    return wrong


def test_deterministic_reductions_of_gpu_arrays():
    assert run(reduce_in_order, deterministic=True) == [[], []]


def move_everything(group):
    import cupy

    n, me = group.world_size, group.rank
    x = cupy.full((3, 2), me, cupy.float32)
    wanted = np.repeat(np.arange(n, dtype=np.float32), 6).reshape(-1, 2)
    gathered = group.gather(x, n - 1)
    scattered = group.scatter(cupy.arange(n) * 5 if me == 0 else None, 0)
    ring = group.sendrecv(x, cupy.empty_like(x), (me + 1) % n, (me - 1) % n)
    swapped = group.all_to_all(cupy.arange(n) + 10 * me)
    uneven = group.all_gather(cupy.full(me, me), sizes=list(range(n)))
    with group.coalesce() as together:
        several = [together.all_reduce(cupy.full(4, k)) for k in range(3)]
    part = group.split(me % 2)
    right = {
        "all_gather": (group.all_gather(x).get() == wanted).all(),
        "gather": me != n - 1 or (gathered.get() == wanted).all(),
        "broadcast": (group.broadcast(x, 1).get() == 1).all(),
        "scatter": int(scattered[0]) == 5 * me,
        "sendrecv": (ring.get() == (me - 1) % n).all(),
        "all_to_all": swapped.get().tolist() == [10 * r + me for r in range(n)],
        "uneven": uneven.get().tolist() == [r for r in range(n) for _ in range(r)],
        "coalesce": [int(p.result()[0]) for p in several] == [0, n, 2 * n],
        "split": int(part.all_reduce(cupy.ones(2))[0]) == part.world_size,
        "objects": group.all_gather_object({"rank": me}) == [{"rank": r} for r in range(n)],
    }
    return [name for name, holds in right.items() if not holds]


def test_movements_of_gpu_arrays():
    assert run(move_everything) == [[], []]


def order(group):
    """Once to compile and connect, which takes its time; then with a caller that is late."""
    import cupy

    spin = cupy.RawKernel(SPIN, "spin")
    found = {}
    streams = {"default": cupy.cuda.Stream.null, "own": cupy.cuda.Stream(non_blocking=True)}
    for cycles in (1, SPIN_CYCLES):
        for name, stream in streams.items():
            with stream:
                x = cupy.zeros(1 << 20, cupy.float32)
                spin((1,), (1,), (np.int64(cycles),))
                x += group.rank + 1  # late
                work = group.all_reduce(x, async_op=True)
                early = work.done()
                del x  # its memory would be given to the next array
                other = cupy.full(1 << 20, 77, cupy.float32)
                twice = work.wait() * 2
                right = bool((twice == 6).all()), bool((other == 77).all())
                found[name] = [early, *right, work.done()]
    return found


def test_operations_are_ordered_against_the_callers_stream():
    for found in run(order):
        assert found == {key: [False, True, True, True] for key in ("default", "own")}


def stay_away(group):
    import cupy

    group.all_reduce(cupy.ones(3)).get()
    if group.rank == 1:
        return "stayed away" if ended(group) else "never told"
    try:
        handle = group.all_reduce(cupy.ones(3), async_op=True, timeout_s=2.0)
        handle.wait()
        cupy.cuda.get_current_stream().synchronize()  # until the group is aborted
        handle.wait()
    except CollectiveTimeout as error:
        return f"missing {list(error.missing)}"
    return "nothing was raised"


def ended(group):
    import time

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            group.backend._queue._store.get("failed", deadline=0.0)
        except TimeoutError:
            time.sleep(0.05)
        else:
            return True
    return False


def test_a_rank_that_stays_away_is_named():
    assert run(stay_away) == ["missing [1]", "stayed away"]


def abort(group):
    import cupy

    group.all_reduce(cupy.ones(3)).get()
    if group.rank == 0:
        group.abort()
        return "aborted"
    try:
        group.barrier()
    except GroupClosed:
        return "closed"
    except FerroError as error:
        return type(error).__name__
    return "nothing"


def test_abort_ends_the_others():
    assert run(abort) == ["aborted", "closed"]
