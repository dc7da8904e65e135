"""The native helper's reductions, rings and short paths by themselves: NumPy's results, and no bad arguments."""

from __future__ import annotations

import collections
import mmap
import struct
import threading

import numpy as np
import pytest

from ferro.collectives.label import Call
from ferro.collectives.reduction import reduction_for
from ferro_gloo.shm.native import ABSENT, NATIVE, OPERATIONS
from ferro_gloo.shm.region import LINE_BYTES, RegionLayout

from .short_paths import REDUCED, assert_same, dtype_of, numbers

pytestmark = pytest.mark.skipif(NATIVE is None, reason=ABSENT)

LAYOUT = RegionLayout(2, 4096)
LABEL = Call("barrier").label()


@pytest.mark.parametrize(("dtype", "reduction"), REDUCED)
def test_reduces_as_numpy_does(dtype, reduction):
    assert NATIVE.has_arithmetic(dtype, reduction)
    for ranks in (1, 2, 3, 7):
        for size in (0, 1, 5, 16, 33, 9001):
            sources = [numbers(dtype_of(dtype), size, [size, rank]) for rank in range(ranks)]
            wanted, out = np.empty_like(sources[0]), np.empty_like(sources[0])
            reduction_for(reduction, out.dtype, ranks).into(wanted, sources, at_once=True)
            NATIVE.reduce(out, sources, dtype, reduction, ranks)
            assert_same(out, wanted, f"{ranks} x {size}")
            first = sources[0].copy()
            NATIVE.reduce(first, [first, *sources[1:]], dtype, reduction, ranks)
            assert first.tobytes() == out.tobytes()


@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [("complex64", "prod"), ("float32", "bor"), ("int32", "mean"), ("float32", "callable"), ("", "")],
)
def test_has_no_other_arithmetic(dtype, reduction):
    assert not NATIVE.has_arithmetic(dtype, reduction)
    with pytest.raises(ValueError, match="there is no"):
        NATIVE.reduce(np.ones(2), [np.ones(2)], dtype, reduction, 1)


FOUR = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((FOUR, [], "float32", "sum", 1), ValueError),
        ((FOUR, [FOUR, np.ones(5, np.float32)], "float32", "sum", 2), ValueError),
        ((FOUR, [np.ones(2)], "float32", "sum", 1), ValueError),
        ((FOUR, [np.ones(8, np.float32)[::2]], "float32", "sum", 1), (ValueError, BufferError)),
        ((np.zeros(17, np.uint8)[1:], [FOUR], "float32", "sum", 1), ValueError),
        ((np.ones(8, np.float32)[:4], 4, "float32", "sum", 1), TypeError),
        ((FOUR, [FOUR.copy(), FOUR.copy(), FOUR], "float32", "sum", 3), ValueError),
        ((FOUR, [FOUR], "float32", "sum", 0), ValueError),
        ((FOUR, [FOUR], "float32", "sum"), TypeError),
    ],
)
def test_refuses_what_it_cannot_reduce(arguments, error):
    with pytest.raises(error):
        NATIVE.reduce(*arguments)


@pytest.fixture
def memory():
    with mmap.mmap(-1, LAYOUT.nbytes) as mapped, memoryview(mapped) as view:
        yield view


def make_ring(memory, **changes):
    arguments = {
        "memory": memory,
        "ranks": 2,
        "rank": 0,
        "headers_at": LAYOUT.headers_at,
        "slots_at": LAYOUT.slots_at,
        "slot_bytes": LAYOUT.slot_bytes,
        "spins": 0,
    }
    return NATIVE.Ring(**(arguments | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"ranks": 0},
        {"ranks": 3},
        {"ranks": 2**31 - 1},
        {"rank": 2},
        {"rank": -1},
        {"headers_at": -64},
        {"headers_at": LAYOUT.nbytes - 64},
        {"headers_at": 2**62},
        {"headers_at": 8},
        {"slots_at": LAYOUT.slots_at + 64},
        {"slots_at": -64},
        {"slots_at": 2**62},
        {"slot_bytes": 0},
        {"slot_bytes": -64},
        {"slot_bytes": 4097},
        {"slot_bytes": 2**62},
        {"spins": -1},
    ],
)
def test_a_ring_lies_within_its_memory(memory, changes):
    with pytest.raises(ValueError, match="are no region"):
        make_ring(memory, **changes)


def test_a_ring_needs_memory_that_it_may_write(memory):
    with pytest.raises(BufferError):
        make_ring(memory.toreadonly())
    with pytest.raises(TypeError):
        make_ring(5)
    with pytest.raises(ValueError, match="are no region"):
        make_ring(memory[8:])


def line_number(memory, rank, slot):
    return struct.unpack_from("=q", memory, LAYOUT.slots_at + (rank * 4 + slot) * (LINE_BYTES + LAYOUT.slot_bytes))[0]


def test_a_ring_numbers_chunks_and_takes_them_back(memory):
    ring = make_ring(memory, rank=1)
    for number in range(10):
        assert ring.begin(LABEL) == number
        ring.publish(number)
        assert line_number(memory, 1, number % 4) == number + 1
        assert struct.unpack_from("=q", memory, 256) == (number + 1,)
        header = LAYOUT.header_at(1, number % 4)
        assert bytes(memory[header : header + 56]) == LABEL
    ring.next = 40
    assert ring.begin(LABEL + bytes(8)) == 40
    assert ring.next == 41
    ring.retract()
    ring.publish(40)
    assert [line_number(memory, 1, slot) for slot in range(4)] == [-1] * 4
    assert struct.unpack_from("=q", memory, 256) == (-1,)
    assert struct.unpack_from("=q", memory, 0) == (0,)
    assert [line_number(memory, 0, slot) for slot in range(4)] == [0] * 4
    del ring


@pytest.mark.parametrize("header", [b"", LABEL[:-8], LABEL + bytes(1), bytes(136), "label"])
def test_a_header_has_a_label(memory, header):
    with pytest.raises((ValueError, TypeError)):
        make_ring(memory).begin(header)


@pytest.mark.parametrize("number", [-1, 2**63 - 1, 2**63, "1"])
def test_publishes_only_numbers_of_chunks(memory, number):
    with pytest.raises((ValueError, OverflowError, TypeError)):
        make_ring(memory).publish(number)


def make_path(ring, **changes):
    arguments = {
        "ring": ring,
        "operation": OPERATIONS.index("all_reduce"),
        "dtype": "float32",
        "reduction": "sum",
        "block_bytes": 64,
        "root": -1,
        "label": LABEL,
        "lock": threading.Lock(),
        "pending": collections.deque(),
        "state": memoryview(bytearray(16)).cast("q"),
        "late": print,
    }
    return NATIVE.ShortPath(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"ring": None}, TypeError),
        ({"operation": len(OPERATIONS)}, ValueError),
        ({"operation": -1}, ValueError),
        ({"dtype": "float31"}, ValueError),
        ({"reduction": ""}, ValueError),
        ({"operation": OPERATIONS.index("broadcast"), "root": 0}, ValueError),
        ({"operation": OPERATIONS.index("broadcast"), "reduction": "", "root": 2}, ValueError),
        ({"operation": OPERATIONS.index("reduce")}, ValueError),
        ({"operation": OPERATIONS.index("barrier"), "reduction": ""}, ValueError),
        ({"operation": OPERATIONS.index("all_to_all"), "reduction": "", "block_bytes": 2049}, ValueError),
        ({"root": 0}, ValueError),
        ({"block_bytes": -4}, ValueError),
        ({"block_bytes": 6}, ValueError),
        ({"block_bytes": 4100}, ValueError),
        ({"block_bytes": 2**62}, ValueError),
        ({"label": LABEL[1:]}, ValueError),
        ({"label": "label"}, TypeError),
        ({"lock": None}, AttributeError),
        ({"state": memoryview(bytearray(8))}, ValueError),
        ({"state": bytes(16)}, BufferError),
    ],
)
def test_a_short_path_fits_its_ring(memory, changes, error):
    ring = make_ring(memory)
    make_path(ring)
    with pytest.raises(error):
        make_path(ring, **changes)
    del ring


def test_an_error_while_waiting_leaves_the_lock_free(memory):
    """The other rank never comes, and `late` raises."""

    def late(number, awaited):
        assert lock.locked()
        raise ZeroDivisionError(number, awaited)

    lock = threading.Lock()
    ring = make_ring(memory)
    path = make_path(ring, lock=lock, late=late)
    x = np.ones(16, np.float32)
    with pytest.raises(ZeroDivisionError, match=r"\(0, 0\)"):
        path(x, x)
    assert not lock.locked()
    assert x.tolist() == [1.0] * 16
    bound = path.bind(x, x)
    assert bound.start()
    assert not bound.test()
    with pytest.raises(ZeroDivisionError, match=r"\(1, 1\)"), lock:
        bound.finish()
    for broken in (None, 5):
        with pytest.raises(TypeError):
            make_path(ring, pending=broken)(x, x)
    del path, bound, ring
