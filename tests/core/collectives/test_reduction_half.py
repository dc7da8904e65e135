"""Half precision: float32 in blocks, with the bits that casting whole arrays would give."""

import threading

import numpy as np
import pytest

from ferro.arrays import dtype_from_name
from ferro.collectives import half
from ferro.collectives.reduction import Reduction

HALVES = ["float16", "bfloat16"]
LENGTHS = [1, 256, 257, half._BLOCK - 1, half._BLOCK, half._BLOCK + 1, 2 * half._BLOCK + 300]
OPERATIONS = {"sum": np.add, "mean": np.add, "prod": np.multiply}

# What becomes infinite in float16 is told by NumPy's cast, and what is infinite or not a number
# by its arithmetic: as warnings, which are no matter here.
quiet = np.errstate(over="ignore", invalid="ignore")


def random_bits(name, ranks, count):
    """Return operands of all kinds: normal, subnormal, infinite and not a number."""
    bits = np.random.default_rng(count).integers(0, 1 << 16, (ranks, count), dtype=np.uint16)
    return list(bits.view(dtype_from_name(name)))


def numbers(name, ranks, count, scale=1.0):
    """Return operands of one magnitude."""
    values = np.random.default_rng(count).standard_normal((ranks, count)) * scale
    return list(values.astype(np.float32).astype(dtype_from_name(name)))


def by_casts(op, operands, ranks):
    """Return the result that whole arrays and their casts give."""
    total = operands[0].astype(np.float32)
    for operand in operands[1:]:
        total = OPERATIONS[op](total, operand.astype(np.float32))
    if op == "mean":
        total /= ranks
    return total.astype(operands[0].dtype)


@quiet
@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("count", LENGTHS)
def test_blocks_give_the_bits_of_casts(name, op, count):
    for operands in (
        random_bits(name, 3, count),  # some of each block are infinite or not a number
        numbers(name, 3, count),
        numbers(name, 3, count, 1e-6),  # subnormal in float16
    ):
        before = [operand.tobytes() for operand in operands]
        out = np.zeros_like(operands[0])
        Reduction(op, out.dtype, 3).into(out, operands, at_once=True)
        assert out.tobytes() == by_casts(op, operands, 3).tobytes()
        assert [operand.tobytes() for operand in operands] == before


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("own", [0, 1, 2])
def test_the_result_may_take_an_operands_place(name, own):
    operands = numbers(name, 3, half._BLOCK + 5)
    expected = by_casts("mean", operands, 3)
    Reduction("mean", operands[0].dtype, 3).combine(operands, own, at_once=True)
    assert operands[own].tobytes() == expected.tobytes()


def test_every_float16_is_widened_and_rounded_to_itself():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    out = np.zeros_like(finite)
    Reduction("sum", finite.dtype, 1).into(out, [finite], at_once=True)
    assert out.tobytes() == finite.tobytes()


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_what_lies_between_two_float16_is_rounded_to_the_nearest_or_even(step):
    """The sum of two neighbours, halved, is exact in float32: a tie, or one place beside it."""
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (every[:-1] + every[1:]) / np.float32(2)
    between = (between.view(np.uint32) + np.uint32(step % (1 << 32))).view(np.float32)
    for sign in (1, -1):
        out = np.zeros(half._BLOCK, np.float16)[: between.size]
        half._narrow(sign * between, out)
        assert out.tobytes() == (sign * between).astype(np.float16).tobytes()


@pytest.mark.parametrize("count", [10, 1000])
def test_what_is_too_large_becomes_infinite_without_a_warning(count):
    out = np.zeros(count, np.float16)
    Reduction("sum", out.dtype, 2).into(out, [np.full(count, 60000, np.float16)] * 2, at_once=True)
    assert (out == np.inf).all()
    Reduction("sum", out.dtype, 2).into(out, [out, -out], at_once=True)
    assert np.isnan(out).all()


def test_threads_reduce_at_the_same_time():
    failures = []

    def work(seed):
        operands = numbers("float16", 2, half._BLOCK + seed)
        expected = by_casts("sum", operands, 2).tobytes()
        out = np.empty_like(operands[0])
        for _ in range(20):
            Reduction("sum", out.dtype, 2).into(out, operands, at_once=True)
            if out.tobytes() != expected:
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert failures == []


class Elsewhere:
    """An array on a GPU, as far as a reduction sees one: its functions and its own memory."""

    def __init__(self, array):
        self.array = array
        self.size = array.size

    def astype(self, dtype):
        return self.array.astype(dtype)

    def __setitem__(self, key, value):
        self.array[key] = value


def test_arrays_elsewhere_are_reduced_whole():
    operands = [Elsewhere(array) for array in numbers("float16", 2, 1000)]
    out = Elsewhere(np.zeros(1000, np.float16))
    half.reduce_half_precision(np.add, operands, out, 2)
    expected = by_casts("mean", [operand.array for operand in operands], 2)
    assert out.array.tobytes() == expected.tobytes()
