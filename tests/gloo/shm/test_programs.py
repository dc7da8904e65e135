"""Random programs: whatever the calls, sizes, dtypes and memory, results are NumPy's, bit for bit.

All ranks draw the same calls from one seed, and each for itself its arrays' memory. Everything
is reduced in order of rank, so that the expected bits are known.
"""

from __future__ import annotations

import math
import threading
import zlib

import numpy as np
import pytest

from ferro_testing import run_ranks

KIB = 1 << 10
# Where something changes: one round, in place, reading, slots and their blocks.
BOUNDARIES = [16 * KIB, 64 * KIB, 128 * KIB, 170 * KIB, 256 * KIB, 512 * KIB, 1024 * KIB]
DTYPES = ["float32", "float64", "float16", "int8", "int64", "complex64", "bool"]
POOL = 310_000
REDUCTIONS = {"sum": np.add, "mean": np.add, "prod": np.multiply, "max": np.maximum, "bxor": np.bitwise_xor}


def data_of(rank):
    return np.random.default_rng(rank).standard_normal(POOL) * 9


class Program:
    """What one rank does in one group; `run` returns a checksum of all results."""

    def __init__(self, group, seed):
        self.group = group
        self.n, self.me = group.world_size, group.rank
        self.same = np.random.default_rng(seed)  # draws alike on all ranks
        self.own = np.random.default_rng([seed, group.rank])
        self.pools = [data_of(rank) for rank in range(self.n)]
        self.pending = []
        self.checksum = 0

    def run(self, calls):
        for number in range(calls):
            self.start = number * 13 % 1000
            self.dtype = np.dtype(self.pick(DTYPES))
            self.async_op = bool(self.same.random() < 0.3)
            call = self.pick([name for name in dir(self) if name.startswith("call_")])
            self.what = f"call {number} on rank {self.me} of {self.n}: {call}, {self.dtype}"
            getattr(self, call)()
            if len(self.pending) > 5 or self.same.random() < 0.3:
                self.check_pending()
        self.check_pending()
        return self.checksum

    # -- drawing ----------------------------------------------------------------------------------

    def pick(self, choices):
        return choices[self.same.integers(len(choices))]

    def size(self, parts=1):
        """Draw a number of elements, a multiple of `parts`: few, around a boundary, or any."""
        kind = self.same.random()
        if kind < 0.3:
            size = int(self.same.integers(0, 40))
        elif kind < 0.7:
            around = self.pick(BOUNDARIES) // self.dtype.itemsize
            size = around + int(self.same.integers(-1, 2)) * parts
        else:
            size = int(math.exp(self.same.uniform(3, 13)))
        return max(0, min(size, POOL - 1000)) // parts * parts

    def sizes(self):
        total, sizes = self.size(), []
        for _ in range(self.n - 1):
            sizes.append(int(self.same.integers(0, total + 1)))
            total -= sizes[-1]
        return [int(size) for size in self.same.permutation([*sizes, total])]

    def of(self, rank, size, salt=0):
        """Return a rank's data."""
        start = self.start + 7 * salt
        return self.pools[rank][start : start + size].astype(self.dtype)

    def memory(self, size):
        """Return an array that lies here or there; each rank draws for itself."""
        kind = self.own.integers(4)
        if kind == 0:
            return np.empty(size, self.dtype)
        if kind == 1:
            return self.group.empty(size, self.dtype)
        if kind == 2:
            return self.group.empty(size + 5, self.dtype)[3 : 3 + size]
        return np.empty(size + 3, self.dtype)[1 : 1 + size]

    def given(self, size, salt=0):
        array = self.memory(size)
        array[...] = self.of(self.me, size, salt)
        return array

    def out(self, size):
        return self.memory(size) if self.own.random() < 0.7 else None

    # -- comparing --------------------------------------------------------------------------------

    def expect(self, result, wanted):
        self.pending.append((result, wanted, self.what))

    def check_pending(self):
        for result, wanted, what in self.pending:
            got = result.wait() if hasattr(result, "wait") else result
            if wanted is None:
                assert got is None, what
                continue
            assert got.dtype == wanted.dtype, what
            if got.tobytes() != wanted.tobytes():
                wrong = np.flatnonzero(got != wanted)
                raise AssertionError(f"{what}, {got.size} elements: wrong from {wrong[:3]} on")
            self.checksum = zlib.crc32(got.tobytes(), self.checksum)
        self.pending.clear()

    def reduced(self, name, arrays):
        """Reduce in order of rank; half precision in float32, rounded once."""
        half = self.dtype == np.float16
        total = arrays[0].astype(np.float32) if half else arrays[0].copy()
        for array in arrays[1:]:
            REDUCTIONS[name](total, array.astype(np.float32) if half else array, out=total)
        if name == "mean":
            parts = total.view(total.real.dtype)  # real and imaginary parts are divided
            np.true_divide(parts, self.n, out=parts)
        with np.errstate(over="ignore"):
            return total.astype(self.dtype)

    def reduction(self):
        names = {"f": ["sum", "mean", "prod", "max"], "c": ["sum", "mean"]}
        return self.pick(names.get(self.dtype.kind, ["sum", "max", "bxor"]))

    # -- the calls --------------------------------------------------------------------------------

    def call_barrier(self):
        self.expect(self.group.barrier(async_op=self.async_op), None)

    def call_all_reduce(self):
        op, size = self.reduction(), self.size()
        x = self.given(size)
        out = x if self.own.random() < 0.5 else self.out(size)
        wanted = self.reduced(op, [self.of(rank, size) for rank in range(self.n)])
        self.expect(self.group.all_reduce(x, op, out=out, async_op=self.async_op), wanted)

    def call_reduce(self):
        op, size, root = self.reduction(), self.size(), self.pick(range(self.n))
        wanted = self.reduced(op, [self.of(rank, size) for rank in range(self.n)])
        result = self.group.reduce(self.given(size), root, op, out=self.out(size), async_op=self.async_op)
        self.expect(result, wanted if self.me == root else None)

    def call_broadcast(self):
        size, root = self.size(), self.pick(range(self.n))
        x = self.given(size)
        out = x if self.own.random() < 0.5 else self.out(size)
        result = self.group.broadcast(x, root, out=out, async_op=self.async_op)
        self.expect(result, self.of(root, size))

    def call_all_gather(self):
        size = self.size()
        out = self.out(size * self.n)
        wanted = np.concatenate([self.of(rank, size) for rank in range(self.n)])
        result = self.group.all_gather(self.given(size), out=out, async_op=self.async_op)
        self.expect(result, wanted)

    def call_uneven_all_gather(self):
        sizes = self.sizes()
        wanted = np.concatenate([self.of(rank, size) for rank, size in enumerate(sizes)])
        x, out = self.given(sizes[self.me]), self.out(sum(sizes))
        result = self.group.all_gather(x, sizes=sizes, out=out, async_op=self.async_op)
        self.expect(result, wanted)

    def call_gather(self):
        even, root = self.same.random() < 0.5, self.pick(range(self.n))
        sizes = [self.size()] * self.n if even else self.sizes()
        wanted = np.concatenate([self.of(rank, size) for rank, size in enumerate(sizes)])
        at_root = self.me == root
        out = self.out(sum(sizes)) if at_root else None
        x, given = self.given(sizes[self.me]), None if even else sizes
        result = self.group.gather(x, root, sizes=given, out=out, async_op=self.async_op)
        self.expect(result, wanted if at_root else None)

    def call_scatter(self):
        even, root = self.same.random() < 0.5, self.pick(range(self.n))
        sizes = [self.size()] * self.n if even else self.sizes()
        if sum(sizes) > POOL - 1000:
            sizes = [size // self.n for size in sizes]
        start = sum(sizes[: self.me])
        wanted = self.of(root, sum(sizes))[start : start + sizes[self.me]]
        x = self.given(sum(sizes)) if self.me == root else None
        given, out = sizes if self.me == root and not even else None, self.out(sizes[self.me])
        result = self.group.scatter(x, root, sizes=given, out=out, async_op=self.async_op)
        self.expect(result, wanted)

    def call_reduce_scatter(self):
        op, even = self.reduction(), self.same.random() < 0.5
        sizes = [self.size(self.n) // self.n] * self.n if even else self.sizes()
        total, start = sum(sizes), sum(sizes[: self.me])
        wanted = self.reduced(op, [self.of(rank, total) for rank in range(self.n)])
        result = self.group.reduce_scatter(
            self.given(total), op, sizes=None if even else sizes, out=self.out(sizes[self.me]), async_op=self.async_op
        )
        self.expect(result, wanted[start : start + sizes[self.me]])

    def call_all_to_all(self):
        block = self.size(self.n) // self.n
        blocks = [self.of(rank, block * self.n).reshape(self.n, block) for rank in range(self.n)]
        x, out = self.given(block * self.n), self.out(block * self.n)
        result = self.group.all_to_all(x, out=out, async_op=self.async_op)
        self.expect(result, np.concatenate([theirs[self.me] for theirs in blocks]))

    def call_uneven_all_to_all(self):
        """Some ranks have even blocks, and so might choose another algorithm than the others."""
        block = self.size(3 * self.n) // (3 * self.n)
        table = np.full((self.n, self.n), block)
        if self.same.random() < 0.8:
            for _ in range(self.same.integers(1, 4)):
                source, target = self.same.integers(self.n, size=2)
                table[source, target] = self.same.integers(0, 2 * block + 2)
        sends = [self.of(rank, table[rank].sum()) for rank in range(self.n)]
        ends = table.cumsum(axis=1)
        parts = [
            sends[rank][ends[rank][self.me] - table[rank][self.me] : ends[rank][self.me]] for rank in range(self.n)
        ]
        result = self.group.all_to_all(
            self.given(int(table[self.me].sum())),
            send_sizes=table[self.me].tolist(),
            out=self.out(int(table[:, self.me].sum())),
            async_op=self.async_op,
        )
        self.expect(result, np.concatenate(parts))


def run_program(group, seed, calls):
    return Program(group, seed).run(calls)


def run_two_at_once(group, seed, calls):
    """Two groups that overlap, each in a thread of its own; rank 0 is in one of them only."""
    parts = [group, group.subgroup(range(1, group.world_size))] if group.rank else [group]
    results = {}

    def run(number):
        results[number] = Program(parts[number], seed + number).run(calls)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(parts), "a thread failed"
    return [results[number] for number in range(len(parts))]


# The last two are many more ranks than this machine has cores.
@pytest.mark.parametrize(("ranks", "calls"), [(2, 300), (3, 200), (4, 150), (5, 120), (8, 20), (16, 6)])
def test_one_group(ranks, calls):
    run_ranks(run_program, ranks, backend="gloo", args=(ranks, calls), timeout_s=60)


@pytest.mark.parametrize("helper", [True, False], ids=["native", "pure Python"])
def test_two_groups_at_once(helper):
    run_ranks(
        run_two_at_once,
        3,
        backend="gloo",
        args=(100, 100),
        timeout_s=60,
        init_options={"backend_options": {"native_helper": helper}},
    )


def order_of_rank(group):
    """Return bits of sums that depend on the order: of results, and of NumPy's in rank order."""
    found = []
    for dtype in (np.float32, np.float16):
        for size in (5, 40_000, 500_000):
            arrays = [
                (data_of(rank)[:1] * 10.0 ** (np.arange(size) % 7 - 3)).astype(dtype)
                for rank in range(group.world_size)
            ]
            mine, shared = arrays[group.rank], group.empty(size, dtype)
            shared[...] = mine
            total = np.zeros(size, np.float32)
            for array in arrays:
                total += array.astype(np.float32)
            wanted = total.astype(dtype).tobytes()
            found.append(group.all_reduce(mine).tobytes() == wanted)
            found.append(group.all_reduce(shared, out=shared).tobytes() == wanted)
    return found


def test_deterministic_results_are_those_of_rank_order():
    results = run_ranks(order_of_rank, 4, backend="gloo", timeout_s=30, init_options={"deterministic": True})
    assert results == [[True] * 12] * 4


def one_even_among_uneven(group):
    """Rank 0 has even blocks in memory that can be used in place; it alone might try to."""
    for block in (4 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB):
        table = np.full((4, 4), block)
        table[1, 2] += 10
        table[2, 1] -= 10
        x = group.empty(int(table[group.rank].sum()), np.int8)
        for _ in range(3):
            x[...] = np.repeat(np.arange(4) + 10 * group.rank, table[group.rank])
            result = group.all_to_all(x, send_sizes=table[group.rank].tolist())
            wanted = np.repeat(10 * np.arange(4) + group.rank, table[:, group.rank])
            assert (result == wanted).all(), block


def test_ranks_with_even_blocks_among_others():
    run_ranks(one_even_among_uneven, 4, backend="gloo", timeout_s=20)


def far_along(group):
    """Numbers of chunks beyond 32 bits: the helper sleeps on the lower half of a counter."""
    group.barrier()
    group._backend._collectives._ring.next += (1 << 32) - 8  # the same slot as before
    totals = [int(group.all_reduce(np.array(group.rank + number))) for number in range(20)]
    x = np.full(500_000, float(group.rank))
    return [totals, float(group.all_reduce(x).max())]


def test_counters_have_more_than_32_bits():
    results = run_ranks(far_along, 3, backend="gloo", timeout_s=30)
    assert results == [[[3 + 3 * number for number in range(20)], 3.0]] * 3
