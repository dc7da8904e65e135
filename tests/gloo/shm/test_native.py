"""The native helper: its sums are NumPy's bit for bit, and bad arguments are refused."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest

from ferro_gloo.shm.native import ABSENT, NATIVE

pytestmark = pytest.mark.skipif(NATIVE is None, reason=ABSENT)

HALF = np.dtype(np.float16)
BRAIN = np.dtype(ml_dtypes.bfloat16)
EVERY_BITS = np.arange(65536, dtype=np.uint16)


def in_numpy(sources: Sequence[np.ndarray], divisor: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        wide = sources[0].astype(np.float32)
        for source in sources[1:]:
            wide += source.astype(np.float32)
        if divisor:
            wide /= np.float32(divisor)
        return wide.astype(sources[0].dtype)


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    """The same bits; one NaN is as good as another."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])


def any_bits(dtype: np.dtype, length: int, seed: int) -> np.ndarray:
    """Numbers of all magnitudes, NaN, infinities and subnormal ones among them."""
    bits = np.random.default_rng(seed).integers(0, 65536, length, dtype=np.uint16)
    return bits.view(dtype)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 255, 511, 512, 513, 5003])
@pytest.mark.parametrize(("count", "divisor"), [(1, 0), (2, 0), (2, 2), (3, 3), (5, 0), (8, 7)])
def test_sums_as_numpy_does(dtype, length, count, divisor):
    sources = [any_bits(dtype, length, seed) for seed in range(count)]
    out = np.empty(length, dtype)
    NATIVE.sum_half(out, sources, dtype == BRAIN, divisor)
    assert_same(out, in_numpy(sources, divisor))


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("step", [7, 65536], ids=["scalars", "vectors"])
@pytest.mark.parametrize("divisor", [0, 3, 1024], ids="divided by {}".format)
def test_rounds_every_number_as_numpy_does(dtype, step, divisor):
    """Divided by 1024, every number of the smaller half comes out subnormal or rounds to zero."""
    every = EVERY_BITS.view(dtype)
    out = np.empty_like(every)
    for start in range(0, len(every), step):
        part = slice(start, start + step)
        NATIVE.sum_half(out[part], [every[part]], dtype == BRAIN, divisor)
    assert_same(out, in_numpy([every], divisor))


@pytest.mark.parametrize("length", [3, 4096], ids=["scalars", "vectors"])
def test_ties_go_to_even_and_too_large_to_infinity(length):
    """2048 + 1 lies between two float16; 65504 + 16 is where rounding first gives infinity."""
    for left, right, expected in [(2048, 1, 2048), (2050, 1, 2052), (65504, 16, np.inf)]:
        sources = [np.full(length, value, np.float16) for value in (left, right)]
        out = np.empty(length, np.float16)
        NATIVE.sum_half(out, sources, False, 0)
        np.testing.assert_array_equal(out, np.full(length, expected, np.float16))


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("index", [0, 2])
def test_writes_over_a_source(dtype, index):
    sources = [any_bits(dtype, 2000, seed) for seed in range(3)]
    expected = in_numpy(sources, 0)
    NATIVE.sum_half(sources[index], sources, dtype == BRAIN, 0)
    assert_same(sources[index], expected)


def test_leaves_what_is_beside_alone():
    around = np.full(40, 7, np.float16)
    NATIVE.sum_half(around[3:22], [np.ones(19, np.float16)] * 2, False, 0)
    np.testing.assert_array_equal(around, [7] * 3 + [2] * 19 + [7] * 18)


def halves(length: int) -> np.ndarray:
    return np.zeros(length, np.float16)


FROZEN = halves(4)
FROZEN.setflags(write=False)
TEN = halves(10)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((halves(4), [], False, 0), ValueError),
        ((halves(4), [halves(3)], False, 0), ValueError),
        ((halves(4), [halves(4), halves(5)], False, 0), ValueError),
        ((halves(4), [np.zeros(2, np.float32)], False, 0), ValueError),
        ((np.zeros(2, np.float32), [halves(4)], False, 0), ValueError),
        ((np.zeros(3, np.uint8), [np.zeros(3, np.uint8)], False, 0), ValueError),
        ((np.zeros(9, np.uint8)[1:], [halves(4)], False, 0), ValueError),
        ((TEN[:8], [TEN[1:9]], False, 0), ValueError),
        ((FROZEN, [halves(4)], False, 0), (ValueError, BufferError, TypeError)),
        ((halves(4), [halves(8)[::2]], False, 0), (ValueError, BufferError)),
        ((halves(4), [4], False, 0), TypeError),
        ((halves(4), 4, False, 0), TypeError),
        ((halves(4), [halves(4)], False, "2"), TypeError),
        ((halves(4), [halves(4)], False), TypeError),
    ],
)
def test_refuses_what_it_cannot_sum(arguments, error):
    with pytest.raises(error):
        NATIVE.sum_half(*arguments)


@pytest.fixture
def counters():
    with mmap.mmap(-1, 4096) as memory, memoryview(memory) as view:
        yield view


@pytest.mark.parametrize("offset", [-8, -(2**63), 4, 2, 4088, 4096, 2**62, 2**63 - 1])
def test_publishes_only_within_the_memory(counters, offset):
    with pytest.raises(ValueError, match="4096 bytes hold no"):
        NATIVE.publish(counters, offset, 1)
    assert bytes(counters) == bytes(4096)


@pytest.mark.parametrize(
    ("first", "stride", "count"),
    [
        (-256, 256, 1),
        (0, 256, 0),
        (0, 256, -1),
        (0, 256, 17),
        (256, 256, 16),
        (0, 2**62, 3),
        (0, 256, 2**62),
        (0, 0, 2),
        (0, -256, 2),
        (0, 8, 2),
        (0, 20, 2),
        (4, 256, 2),
    ],
)
def test_waits_only_within_the_memory(counters, first, stride, count):
    with pytest.raises(ValueError, match="4096 bytes hold no"):
        NATIVE.wait(counters, first, stride, count, 1, 0, 0, 0.0)


def test_counters_may_fill_the_memory(counters):
    NATIVE.publish(counters, 4080, 5)
    assert NATIVE.wait(counters, 4080, 16, 1, 5, 0, 0, 0.0) is None
    assert NATIVE.wait(counters, 0, 4080, 2, 5, 0, 0, 0.0) == 0
    NATIVE.publish(counters, 0, -(2**63))
    assert struct.unpack_from("=q", counters, 0) == (-(2**63),)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda counters: NATIVE.publish(counters, 0), TypeError),
        (lambda counters: NATIVE.publish(counters, 0, 2**63), OverflowError),
        (lambda counters: NATIVE.publish(counters, 0, "1"), TypeError),
        (lambda counters: NATIVE.publish(counters.toreadonly(), 0, 1), BufferError),
        (lambda counters: NATIVE.publish(counters[:15], 0, 1), ValueError),
        (lambda counters: NATIVE.publish(counters[:0], 0, 1), ValueError),
        (lambda counters: NATIVE.publish(counters[4:], 0, 1), ValueError),
        (lambda counters: NATIVE.wait(counters, 0, 256, 2, 1), TypeError),
        (lambda counters: NATIVE.wait(counters.toreadonly(), 0, 256, 2, 1, 0, 0, 0.0), BufferError),
        (lambda counters: NATIVE.wait(counters, 0, 256, 2, 1, 0, 0, "1"), TypeError),
        (lambda counters: NATIVE.wait(counters, 0, 256, 2, 1, 10**7, 0, 0.0), ValueError),
        (lambda counters: NATIVE.wait(counters, 0, 256, 2, 1, 0, 10**7, 0.0), ValueError),
    ],
)
def test_refuses_bad_arguments(counters, call, error):
    with pytest.raises(error):
        call(counters)
    assert bytes(counters) == bytes(4096)
