"""Reduction.into: the bits that `combine` gives, in memory of the caller's, operands unchanged."""

import operator
import warnings
from functools import partial

import numpy as np
import pytest

from ferro.collectives.reduction import Reduction
from ferro.errors import UnsupportedError, UsageError

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


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", "bfloat16"])
@pytest.mark.parametrize("op", ["sum", "mean", "prod", "min", "max"])
@pytest.mark.parametrize("count", [3, 70_000])
def test_a_result_depends_on_no_setting_of_the_program(dtype, op, count):
    if dtype == "c8" and op in ("min", "max"):
        pytest.skip("complex numbers have no order")
    pytest.importorskip("ml_dtypes")
    kind = np.dtype(dtype)
    largest = np.full(count, 3e38 if dtype != "f8" else 1.7e308)
    with np.errstate(all="ignore"):
        operands = [largest.astype(kind), largest.astype(kind), np.full(count, 1e-38).astype(kind)]
        operands[2][0] = np.nan
        reduction = Reduction(op, kind, 3)
        wanted = combined(reduction, operands, at_once=True)
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert combined(reduction, operands, at_once=True).tobytes() == wanted.tobytes()
        out = np.empty_like(wanted)
        reduction.into(out, operands, at_once=True)
        assert out.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (max, "max"),
        (min, "min"),
        (sum, "sum"),
        (np.add, "sum"),
        (np.multiply, "prod"),
        (np.maximum, "max"),
        (np.bitwise_or, "bor"),
        (np.sum, "sum"),
        (np.mean, "mean"),
        (np.amax, "max"),
        (operator.add, "sum"),
        (operator.xor, "bxor"),
    ],
)
def test_well_known_functions_stand_for_named_reductions(function, name):
    assert Reduction(function, np.dtype("i4" if name[0] == "b" else "f4"), 2).name == name


class Callable:
    def __call__(self, a, b):
        return a + b


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda a, b: a + b, r"<lambda>\(a, b\): a reduction is a name, such as 'sum', or a function \(a, b, out\)"),
        (Callable(), "a reduction is a name"),
        (any, "a reduction is a name"),
        (np.sin, "op=sin takes 1 arrays and gives 1"),
        (np.divmod, "op=divmod takes 2 arrays and gives 2"),
        (None, "not None"),
        (1.5, "not 1.5"),
    ],
    ids=["two arguments", "object", "builtin", "one operand", "two results", "None", "number"],
)
def test_a_function_that_cannot_be_called_is_refused(function, words):
    with pytest.raises(UsageError, match=words):
        Reduction(function, np.dtype("f4"), 2)


def test_functions_with_defaults_and_partial_ones_are_taken():
    def scaled(factor, a, b, out, *, shift=0):
        np.add(a, b * factor + shift, out=out)

    reduction = Reduction(partial(scaled, 2), np.dtype("f8"), 2)
    assert combined(reduction, [np.ones(2), np.ones(2)], at_once=True).tolist() == [3.0, 3.0]


@pytest.mark.parametrize("result", [lambda a, b: a + b, lambda a, b: (a + b).tolist()], ids=["array", "list"])
def test_a_function_may_return_its_result(result):
    operands = operands_of("f8", 3)
    reduction = Reduction(lambda a, b, out: result(a, b), np.dtype("f8"), 3)
    wanted = combined(Reduction("sum", np.dtype("f8"), 3), operands, at_once=True)
    assert combined(reduction, operands, at_once=True).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("result", [np.ones(3), np.ones((), "f8"), [], 1.5, np.ones(2, "c8"), "x"], ids=str)
def test_a_function_that_returns_another_kind_of_result_is_an_error(result):
    reduction = Reduction(lambda a, b, out: result, np.dtype("f8"), 2)
    with pytest.raises(RuntimeError, match=r"<lambda>, returned .* in place of float64"):
        combined(reduction, [np.ones(2), np.ones(2)], at_once=True)


def test_a_function_in_steps_gives_the_same_result_in_any_place():
    def product_and_sum(a, b, out):
        out[...] = a * b
        out += a + b

    reduction = Reduction(product_and_sum, np.dtype("f8"), 3)
    operands = [np.array([2.0, 3.0]), np.array([5.0, 7.0]), np.array([11.0, 13.0])]
    assert_same_in_any_place(reduction, operands)


def test_a_ufunc_without_a_loop_for_the_dtype_is_refused():
    with pytest.raises(UnsupportedError, match="op=arctan2 is not defined for int64"):
        Reduction(np.arctan2, np.dtype("i8"), 2)


def assert_same_in_any_place(reduction, operands):
    """Let every rank's place, and `into` with every kind of memory, take the result; all must have the same bits."""
    found = set()
    for own in range(len(operands)):
        copies = [operand.copy() for operand in operands]
        reduction.combine(copies, own, at_once=True)
        found.add(copies[own].tobytes())
        copies = [operand.copy() for operand in operands]
        out = copies[own] if own < 2 else np.empty_like(copies[0])
        reduction.into(out, copies, at_once=True)
        found.add(out.tobytes())
    assert len(found) == 1, f"{reduction.name} of {operands}"


def random_bits(random, dtype, count):
    """Draw numbers of which many are special: NaN with any sign and payload, infinities, signed zeros."""
    if dtype.kind in "iub":
        return random.integers(0, 2 if dtype.kind == "b" else 127, count).astype(dtype)
    real = np.empty(0, dtype).real.dtype
    numbers = random.standard_normal(count * (dtype.itemsize // real.itemsize)).astype(real)
    bits = numbers.view(f"u{real.itemsize}")
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0]).astype(real)
    chosen = random.random(bits.size) < 0.5
    bits[chosen] = special.view(bits.dtype)[random.integers(0, 6, int(chosen.sum()))]
    bits[np.isnan(numbers)] |= random.integers(0, 8, int(np.isnan(numbers).sum())).astype(bits.dtype)
    return numbers.view(dtype)


@pytest.mark.parametrize("dtype", ["f4", "f8", "c8", "c16", "f2", "bfloat16", "i4"])
def test_the_bits_do_not_depend_on_the_place_of_the_result(dtype):
    pytest.importorskip("ml_dtypes")
    kind, random = np.dtype(dtype), np.random.default_rng(7)
    names = ["sum", "prod"] + ["mean"] * (kind.kind != "i") + ["min", "max"] * (kind.kind != "c")
    for name in names:
        for ranks, count in [(2, 1)] * 20 + [(3, 1)] * 10 + [(2, 2), (3, 7), (2, 33), (4, 100)]:
            operands = [random_bits(random, kind, count) for _ in range(ranks)]
            assert_same_in_any_place(Reduction(name, kind, ranks), operands)


@pytest.mark.parametrize("dtype", ["c8", "c16"])
def test_a_complex_product_has_the_same_bits_however_it_is_cut(dtype):
    random, kind = np.random.default_rng(3), np.dtype(dtype)
    operands = [random.standard_normal(2 * 50).astype(f"f{kind.itemsize // 2}").view(kind) for _ in range(3)]
    reduction = Reduction("prod", kind, 3)
    whole = combined(reduction, operands, at_once=True)
    pieces = [combined(reduction, [a[i : i + 3] for a in operands], at_once=True) for i in range(0, 50, 3)]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()
    np.testing.assert_allclose(whole, operands[0] * operands[1] * operands[2], rtol=1e-5)


def test_a_complex_mean_divides_the_parts():
    operands = [np.array([complex(np.inf, 3.0), 1 + 2j])] * 3
    mean = combined(Reduction("mean", np.dtype("c16"), 3), operands, at_once=True)
    assert mean.tolist() == [complex(np.inf, 3.0), 1 + 2j]
