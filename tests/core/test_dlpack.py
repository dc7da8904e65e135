"""Arrays of other libraries: dtypes that NumPy does not exchange, signs that DLPack does not tell, kinds of results."""

import sys
import types

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro import UnsupportedError, UsageError
from ferro.arrays import InputArray, output_array
from ferro.arrays.dlpack import _CODES, _WithDtype


class Exported:
    """An array of another library, of a dtype of ml_dtypes."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        bits = self.array.view(f"u{self.array.itemsize}")
        return _WithDtype(bits, _CODES[self.array.dtype.name]).__dlpack__(**options)

    def __dlpack_device__(self):
        return (1, 0)


class Negated(Exported):
    """An array whose numbers are the negatives of its memory."""

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def is_neg(self):
        return True

    def resolve_neg(self):
        return -self.array


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes_of_ml_dtypes_come_in_and_leave(monkeypatch, name):
    def from_dlpack(given):
        """Take in what a library would be given: a capsule with its own code of the dtype."""
        bits = _WithDtype(given, 1)
        array = np.from_dlpack(bits)
        assert bits.found == (_CODES[name], 8 * array.itemsize)
        return Exported(array.view(getattr(ml_dtypes, name)))

    monkeypatch.setitem(sys.modules, "otherlib", types.SimpleNamespace(from_dlpack=from_dlpack))
    monkeypatch.setattr(Exported, "__module__", "otherlib.core")
    numbers = np.arange(6).astype(getattr(ml_dtypes, name)).reshape(2, 3)
    entry = InputArray(Exported(numbers), moved=True)
    assert entry.dtype == numbers.dtype
    assert np.shares_memory(entry.array, numbers)
    result = entry.convert_result(entry.array.copy())
    assert isinstance(result, Exported)
    assert result.array.tobytes() == numbers.tobytes()
    if name == "bfloat16":
        totals = ferro.simulate(lambda group: group.all_reduce(Exported(numbers)), 2)
        assert [total.array.tolist() for total in totals] == [(2 * numbers).tolist()] * 2
        out = np.zeros_like(numbers)
        ferro.simulate(lambda group: group.all_reduce(Exported(numbers), out=Exported(out)), 1)
        assert out.tolist() == numbers.tolist()


def test_a_library_tells_its_namespace(monkeypatch):
    monkeypatch.setitem(sys.modules, "other.arrays", types.SimpleNamespace())
    space = types.SimpleNamespace(from_dlpack=lambda array: ("theirs", array.tolist()))
    theirs = Exported(np.ones(2, ml_dtypes.bfloat16))
    theirs.__array_namespace__ = lambda: space
    assert InputArray(theirs).convert_result(np.ones(2)) == ("theirs", [1.0, 1.0])


def test_a_negated_array_comes_in_with_its_signs_and_is_refused_as_out():
    negated = Negated(np.array([1.0, 2.0]))
    assert InputArray(negated).array.tolist() == [-1.0, -2.0]
    with pytest.raises(UsageError, match=r"out is a .* whose memory holds the negative numbers"):
        output_array(negated, (2,), np.dtype("f8"))


def test_a_device_that_dlpack_does_not_know_is_refused():
    class Nowhere(Exported):
        def __dlpack_device__(self):
            raise ValueError("no such device")

    with pytest.raises(UnsupportedError, match="DLPack does not take: no such device"):
        InputArray(Nowhere(np.ones(1)))


def test_torch_tensors_come_in_and_leave():
    torch = pytest.importorskip("torch")

    def work(group):
        ones = torch.ones(3, dtype=torch.bfloat16)
        total = group.all_reduce(ones)
        assert total.dtype == torch.bfloat16
        assert total.tolist() == [2.0] * 3
        group.all_reduce(ones, out=ones)
        assert ones.tolist() == [2.0] * 3
        small = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
        gathered = group.all_gather(small)
        assert (gathered.dtype, gathered.float().tolist()) == (small.dtype, [1.0, 2.0] * 2)
        assert group.all_reduce(torch.tensor([1 + 2j]).conj().imag).tolist() == [-4.0]
        with pytest.raises(UsageError, match="conjugate bit"):
            group.all_reduce(torch.tensor([1 + 2j]).conj())
        with pytest.raises(UsageError, match=r"detach\(\)"):
            group.all_reduce(torch.ones(1, requires_grad=True))
        with pytest.raises(UnsupportedError, match="DLPack does not take"):
            group.all_reduce(torch.ones(1, device="meta"))

    ferro.simulate(work, 2)


def test_jax_arrays_come_in_and_leave():
    jax = pytest.importorskip("jax")

    def work(group):
        for dtype in ("float32", "bfloat16", "int32", "bool", "complex64"):
            total = group.all_reduce(jax.numpy.ones(3, dtype))
            assert isinstance(total, jax.Array)
            assert total.dtype == dtype
        gathered = group.all_gather(jax.numpy.ones(2, "float8_e5m2"))
        assert isinstance(gathered, jax.Array)
        assert gathered.dtype == "float8_e5m2"
        with pytest.raises(UsageError, match="read-only"):
            group.all_reduce(jax.numpy.ones(2), out=jax.numpy.ones(2))

    ferro.simulate(work, 2)
