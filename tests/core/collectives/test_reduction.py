"""Reduction.into: the bits that `combine` gives, in memory of the caller's, operands unchanged."""

import numpy as np
import pytest

from ferro.collectives.reduction import Reduction

NAMED = [
    ("sum", "f4"),
    ("sum", "c8"),
    ("sum", "i4"),
    ("mean", "f4"),
    ("mean", "f8"),
    ("prod", "f8"),
    ("min", "f4"),
    ("max", "i8"),
    ("band", "u2"),
    ("bor", "?"),
    ("bxor", "i1"),
]


def operands_of(dtype, ranks, count=1000):
    """Return operands whose sums depend on the order, with NaN, infinities and signed zeros."""
    random = np.random.default_rng(ranks)
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        operands = random.standard_normal((ranks, count)) * 10.0 ** random.integers(-4, 5, count)
        operands[0, :4] = [np.nan, np.inf, -0.0, -np.inf]
        return list(operands.astype(dtype))
    if dtype.kind == "c":
        return list(random.standard_normal((ranks, count)).astype(dtype))
    return list(random.integers(0, 2 if dtype.kind == "b" else 100, (ranks, count)).astype(dtype))


def combined(reduction, operands, *, at_once):
    """Return what `combine` makes of copies of the operands."""
    copies = [operand.copy() for operand in operands]
    reduction.combine(copies, 0, at_once=at_once)
    return copies[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize(("op", "dtype"), NAMED)
@pytest.mark.parametrize("at_once", [True, False])
def test_into_gives_the_bits_of_combine(op, dtype, ranks, at_once):
    reduction = Reduction(op, np.dtype(dtype), ranks)
    operands = operands_of(dtype, ranks)
    before = [operand.tobytes() for operand in operands]
    out = np.ones_like(operands[0])
    reduction.into(out, operands, at_once=at_once)
    assert out.tobytes() == combined(reduction, operands, at_once=at_once).tobytes()
    assert [operand.tobytes() for operand in operands] == before


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("op", ["mean", "max"])
def test_into_may_go_into_the_first_operand(op, ranks):
    reduction = Reduction(op, np.dtype("f4"), ranks)
    operands = operands_of("f4", ranks)
    others = [operand.tobytes() for operand in operands[1:]]
    expected = combined(reduction, operands, at_once=True)
    reduction.into(operands[0], operands, at_once=True)
    assert operands[0].tobytes() == expected.tobytes()
    assert [operand.tobytes() for operand in operands[1:]] == others


def test_into_calls_a_users_function_left_to_right():
    def digits(a, b, out):
        out[...] = 10 * a + b

    operands = [np.array([float(rank)]) for rank in range(1, 5)]
    out = np.zeros(1)
    Reduction(digits, np.dtype(float), 4).into(out, operands, at_once=True)
    assert out.tolist() == [1234.0]
    assert [operand.item() for operand in operands] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_a_sum_is_left_undivided_until_all_are_in(dtype):
    reduction = Reduction("mean", np.dtype(dtype), 4)
    operands = [np.full(3, 2, dtype), np.full(3, 4, dtype)]
    out = np.empty(3, dtype)
    reduction.into(out, operands, at_once=False)
    assert out.tolist() == [6.0] * 3
    reduction.finish(out)
    assert out.tolist() == [1.5] * 3


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_nothing_is_reduced_to_nothing(dtype):
    out = np.empty(0, dtype)
    Reduction("sum", np.dtype(dtype), 2).into(out, [out.copy(), out.copy()], at_once=True)
    assert out.size == 0
