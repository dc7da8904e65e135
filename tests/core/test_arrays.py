"""ferro.arrays: the arrays that are taken in, those that are refused, and the kind of the results."""

import numpy as np
import pytest

from ferro.arrays import InputArray, dtype_from_name, output_array
from ferro.collectives.reduction import Reduction
from ferro.errors import UnsupportedError, UsageError
from ferro.group.arguments import OutputBuffer, flattened
from ferro.group.codec import encode
from ferro.types import Device


class Tensor:
    """An array of another library: DLPack is all that it speaks."""

    device = (1, 0)

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


def test_numpy_arrays_come_in_as_they_are():
    array = np.arange(6).reshape(2, 3)
    entry = InputArray(array)
    assert entry.array is array
    assert entry.device is Device.CPU
    assert entry.convert_result(array) is array


@pytest.mark.parametrize("value", [1, 2.5, True, 1j, [1, 2], ((1.0,), (2.0,)), np.int8(3)])
def test_numbers_and_lists_become_arrays(value):
    entry = InputArray(value)
    np.testing.assert_array_equal(entry.array, np.asarray(value))
    assert entry.array.dtype == np.asarray(value).dtype


def test_other_libraries_share_their_memory():
    array = np.arange(4.0)
    entry = InputArray(Tensor(array))
    assert np.shares_memory(entry.array, array)
    array[0] = 9
    assert entry.array[0] == 9


def test_a_result_leaves_as_the_callers_kind(monkeypatch):
    import sys
    import types

    library = types.ModuleType("otherlib")
    library.from_dlpack = Tensor
    monkeypatch.setitem(sys.modules, "otherlib", library)
    theirs = type("OtherTensor", (Tensor,), {"__module__": "otherlib.core"})
    result = InputArray(theirs(np.arange(3.0))).convert_result(np.ones(3))
    assert type(result) is Tensor
    assert result.array.tolist() == [1.0, 1.0, 1.0]


def test_an_array_of_another_device_is_refused():
    elsewhere = Tensor(np.ones(1))
    elsewhere.device = (2, 0)
    with pytest.raises(UnsupportedError, match="DLPack device 2; only CPU memory"):
        InputArray(elsewhere)


def test_an_array_that_cannot_be_exchanged_is_refused():
    read_only = np.ones(2)

    class Stubborn(Tensor):
        def __dlpack__(self, **options):
            raise BufferError("it needs its gradient")

    with pytest.raises(UsageError, match="cannot be exchanged through DLPack: it needs"):
        InputArray(Stubborn(read_only))


@pytest.mark.parametrize("dtype", ["bool", "i1", "i8", "u2", "f2", "f4", "f8", "c8", "c16", "bfloat16"])
def test_dtypes_are_known_by_name_on_other_ranks(dtype):
    from ferro_testing.samples import dtype_of

    kind = dtype_of(dtype)
    assert InputArray(np.zeros(2, kind)).array.dtype == kind
    assert dtype_from_name(kind.name) == kind


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a"]),
        np.array([b"a"]),
        np.array([None]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, [("a", "i4")]),
        np.zeros(2, ">i4"),
        np.zeros(2, np.longdouble),
    ],
    ids=lambda array: str(array.dtype),
)
def test_dtypes_without_a_common_meaning_are_refused(array):
    with pytest.raises(UnsupportedError, match="input has"):
        InputArray(array)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int4"])
def test_float8_is_moved_but_not_reduced(name):
    import ml_dtypes

    numbers = np.arange(3).astype(getattr(ml_dtypes, name))
    with pytest.raises(UnsupportedError, match=f"{name}, which is moved but not reduced: pass x.astype"):
        InputArray(numbers)
    entry = InputArray(numbers, moved=True)
    assert entry.dtype == numbers.dtype
    assert entry.array.dtype == np.uint8
    assert entry.convert_result(entry.array).dtype == numbers.dtype
    assert dtype_from_name(name) == numbers.dtype
    with pytest.raises(UsageError, match="no safe encoding"):
        encode(numbers)


class Metres(np.ndarray):
    """An array with a unit."""


class Quantity:
    """Numbers with a unit, in a class of its own that passes on what it is asked for, as pint's does."""

    __array_ufunc__ = None

    def __getattr__(self, name):
        return getattr(np.ones(2), name)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.ma.array([1.0, 2.0], mask=[0, 1]), "a MaskedArray, whose mask would be lost: pass x.filled"),
        (np.ma.masked, "a MaskedArray, whose mask would be lost"),
        ([1.0, np.ma.masked], "a MaskedArray, whose mask would be lost"),
        ([[1.0], (np.ma.array([1.0]),)], "a MaskedArray, whose mask would be lost"),
        (np.ones((1, 1)).view(np.matrix), "a matrix, of which only the numbers would travel: pass np.asarray"),
        (np.ones(2).view(Metres), "a Metres, of which only the numbers"),
        (Quantity(), "a Quantity, of which only the numbers"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arrays_that_mean_more_than_their_numbers_are_refused(value, words):
    with pytest.raises(UsageError, match=f"input is {words}"):
        InputArray(value)
    if isinstance(value, np.ndarray):
        with pytest.raises(UsageError, match=f"out is {words}"):
            output_array(value, value.shape, value.dtype)


def test_maps_of_files_and_views_are_plain(tmp_path):
    mapped = np.memmap(tmp_path / "m", np.float64, "w+", shape=(4,))
    for plain in (mapped, mapped[1:], np.arange(6.0)[::2], np.ma.array([1.0]).data, np.float32(1)):
        np.testing.assert_array_equal(InputArray(plain).array, plain)
    assert output_array(mapped, (4,), np.dtype(np.float64)).base is mapped


def test_out_is_taken_as_it_is():
    array = np.zeros((2, 3), np.int8)
    assert output_array(array, (2, 3), np.dtype("i1")) is array
    shared = output_array(Tensor(array), (2, 3), np.dtype("i1"))
    assert np.shares_memory(shared, array)


def test_out_on_another_device_is_refused():
    with pytest.raises(UsageError, match="out is on device cpu, the result on cuda"):
        output_array(np.zeros(2), (2,), np.dtype(float), Device.CUDA)


def test_an_outlet_gives_out_itself_or_new_memory():
    entry = InputArray(np.ones((2, 2)))
    out = np.zeros((3, 2))
    outlet = OutputBuffer(entry, out, (3, 2))
    outlet.flat[...] = 7
    assert outlet() is out
    assert (out == 7).all()
    fresh = OutputBuffer(entry, None, (4,))
    assert fresh.array.shape == (4,)
    assert fresh.array.dtype == np.float64
    scalar = OutputBuffer(InputArray(1.5), None, ())
    scalar.flat[...] = 2
    assert scalar().shape == ()
    assert scalar() == 2


def test_flat_copies_only_where_it_must():
    array = np.arange(6).reshape(2, 3)
    assert np.shares_memory(flattened(array, copy=False), array)
    assert not np.shares_memory(flattened(array, copy=True), array)
    turned = flattened(array.T, copy=False)
    assert turned.tolist() == [0, 3, 1, 4, 2, 5]
    assert not np.shares_memory(turned, array)
    assert flattened(np.array(3), copy=False).tolist() == [3]


@pytest.mark.parametrize("own", [0, 1, 3])
def test_operands_are_reduced_left_to_right_into_their_place(own):
    seen = []

    def note(a, b, out):
        seen.append((a.copy(), b.copy()))
        np.subtract(a, b, out=out)

    operands = [np.array([10.0**i]) for i in range(4)]
    Reduction(note, np.dtype(float), 4).combine(operands, own, at_once=False)
    assert operands[own].tolist() == [1.0 - 10 - 100 - 1000]
    assert [b.item() for _, b in seen] == [10.0, 100.0, 1000.0]


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_halves_are_accumulated_in_float32(name):
    dtype = dtype_from_name(name)
    operands = [np.array([1.0], dtype)] + [np.array([2.0**-9], dtype) for _ in range(64)]
    reduction = Reduction("sum", dtype, 65)
    assert reduction.needs_all
    reduction.combine(operands, 0, at_once=True)
    assert float(operands[0][0]) == 1.125  # in halves every addend would be rounded away
