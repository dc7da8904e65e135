"""Collectives on arrays of the GPU: every dtype, reduction and shape of call, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from ferro import GroupClosed
from ferro_testing.samples import DTYPES, dtype_of, noise, reduced, reductions, sample

N = 2


def on_gpu(machine, group, call, values, **options):
    """Make a call on GPU arrays; return its result as a NumPy array, None where there is none."""
    result = call(machine.array(values), **options)
    return None if result is None else machine.host(result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(machine, on_ranks, dtype):
    def work(group):
        wrong = []
        me = group.rank
        for op in reductions(dtype):
            for shape in ((7,), (3, 5), (0,), ()):
                wanted = reduced([sample(r, shape, dtype) for r in range(N)], op)
                given = sample(me, shape, dtype)
                found = on_gpu(machine, group, group.all_reduce, given, op=op)
                if found.dtype != wanted.dtype or found.tobytes() != wanted.tobytes():
                    wrong.append(("all_reduce", op, shape))
                at_root = on_gpu(machine, group, group.reduce, given, root=1, op=op)
                if (at_root is not None) != (me == 1):
                    wrong.append(("reduce", op, shape, "root"))
                if me == 1 and at_root.tobytes() != wanted.tobytes():
                    wrong.append(("reduce", op, shape))
            for sizes in (None, [1, 5]):
                whole = reduced([sample(r, (6, 2), dtype) for r in range(N)], op)
                rows = sizes or [3, 3]
                part = whole[sum(rows[:me]) : sum(rows[: me + 1])]
                given = sample(me, (6, 2), dtype)
                found = on_gpu(machine, group, group.reduce_scatter, given, op=op, sizes=sizes)
                if found.tobytes() != part.tobytes():
                    wrong.append(("reduce_scatter", op, sizes))
        return wrong

    assert on_ranks(N, work) == {0: [], 1: []}


def test_movements(machine, on_ranks):
    n = 3

    def work(group):
        me = group.rank
        given = machine.array(sample(me, (3, 2), "bfloat16"))
        everyone = np.concatenate([sample(r, (3, 2), "bfloat16") for r in range(n)])
        host = machine.host
        same = {}
        same["all_gather"] = host(group.all_gather(given)).tobytes() == everyone.tobytes()
        uneven = machine.array(np.full((me, 2), me))
        wanted = np.concatenate([np.full((r, 2), r) for r in range(n)])
        found = host(group.all_gather(uneven, sizes=range(n)))
        same["all_gather, uneven"] = found.tolist() == wanted.tolist()
        found = host(group.broadcast(given, 2))
        same["broadcast"] = found.tobytes() == sample(2, (3, 2), "bfloat16").tobytes()
        found = group.gather(uneven, 1, sizes=range(n))
        right = found is None if me != 1 else host(found).tolist() == wanted.tolist()
        same["gather"] = right
        source = machine.array(np.arange(6.0)) if me == 1 else None
        found = group.scatter(source, 1, sizes=[1, 2, 3])
        found = host(found) if me == 1 else found
        same["scatter"] = found.tolist() == [[0.0], [1.0, 2.0], [3.0, 4.0, 5.0]][me]
        swapped = host(group.all_to_all(machine.array(np.arange(3) + 10 * me)))
        same["all_to_all"] = swapped.tolist() == [me, 10 + me, 20 + me]
        rows = machine.array(np.repeat(me, 3))
        swapped = host(group.all_to_all(rows, send_sizes=[0, 1, 2]))
        same["all_to_all, uneven"] = swapped.tolist() == [r for r in range(n) for _ in range(me)]
        with group.coalesce() as together:
            pending = [together.all_reduce(machine.array([1.0 * me + k])) for k in range(3)]
        same["coalesce"] = [host(p.result()).tolist() for p in pending] == [[3.0], [6.0], [9.0]]
        return [name for name, right in same.items() if not right]

    assert on_ranks(n, work) == {key: [] for key in range(n)}


def test_results_go_into_out_and_inputs_stay(machine, on_ranks):
    def work(group):
        x = machine.array(np.arange(4.0) + group.rank)
        out = machine.empty((4,), float)
        result = group.all_reduce(x, out=out)
        return result is out, machine.host(out).tolist(), machine.host(x).tolist()

    results = on_ranks(2, work)
    assert results[1] == (True, [1.0, 3.0, 5.0, 7.0], [1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("count", [30, 300_000])
def test_deterministic_sums_are_those_in_order_of_rank(machine, on_ranks, dtype, count):
    n = 3
    plain = "float32" if dtype == "complex64" else dtype
    given = [noise(rank, count, plain).astype(dtype_of(dtype)) for rank in range(n)]

    def work(group):
        wanted = reduced(given, "sum")
        total = machine.host(group.all_reduce(machine.array(given[group.rank])))
        part = machine.host(group.reduce_scatter(machine.array(given[group.rank])))
        mine = np.split(wanted, n)[group.rank]
        return total.tobytes() == wanted.tobytes(), part.tobytes() == mine.tobytes()

    assert on_ranks(n, work, deterministic=True) == dict.fromkeys(range(n), (True, True))


def test_a_function_reduces_on_the_gpu(machine, on_ranks):
    def work(group):
        given = machine.array(np.arange(5.0) * (group.rank + 1))
        total = group.all_reduce(given, lambda a, b, out: np.add(np.add(a, a), b, out=out))
        return machine.host(total).tolist()

    assert on_ranks(2, work) == {key: [0.0, 4.0, 8.0, 12.0, 16.0] for key in range(2)}


def test_an_array_of_another_gpu_is_refused_by_name(machine, on_ranks):
    def work(group):
        machine.here.device = 1 - group.rank  # where the result is made, too
        with pytest.raises(GroupClosed, match=r"an array is on GPU ., this group's arrays are on"):
            group.all_reduce(machine.array([1.0]))

    on_ranks(2, work)


def test_making_a_group_makes_the_ranks_gpu_current(machine, on_ranks):
    assert on_ranks(3, lambda group: machine.here.device) == {0: 0, 1: 1, 2: 2}
