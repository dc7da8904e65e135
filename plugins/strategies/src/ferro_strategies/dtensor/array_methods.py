"""The methods and operators of numpy.ndarray, for DTensor: each is the NumPy function of its name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from numpy.lib.mixins import NDArrayOperatorsMixin

from .ops.reductions import Axis


class ArrayMethods(NDArrayOperatorsMixin):
    """Methods that call NumPy's function on the array; over cut dims a reduction gives a Partial."""

    @abstractmethod
    def __array_function__(
        self, func: Callable[..., object], types: Iterable[type], args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        """Apply a NumPy function."""

    def _call(self, function: Callable[..., object], *args: object, **options: object) -> Any:
        return self.__array_function__(function, (type(self),), (self, *args), options)

    # -- reductions ------------------------------------------------------------------------------

    def sum(
        self,
        axis: Axis = None,
        dtype: npt.DTypeLike | None = None,
        out: Self | None = None,
        *,
        keepdims: bool = False,
        initial: object = None,
        where: object = True,
    ) -> Self:
        """Sum over dims, over all if `axis` is None; Partial over sharded dims."""
        return self._reduce(np.sum, axis, keepdims, out, initial, where, dtype=dtype)

    def mean(
        self,
        axis: Axis = None,
        dtype: npt.DTypeLike | None = None,
        out: Self | None = None,
        *,
        keepdims: bool = False,
        where: object = True,
    ) -> Self:
        """Average over dims by the global number of elements; a Partial sum over sharded dims."""
        return self._reduce(np.mean, axis, keepdims, out, None, where, dtype=dtype)

    def prod(
        self,
        axis: Axis = None,
        dtype: npt.DTypeLike | None = None,
        out: Self | None = None,
        *,
        keepdims: bool = False,
        initial: object = None,
        where: object = True,
    ) -> Self:
        """Multiply over dims; Partial over sharded dims."""
        return self._reduce(np.prod, axis, keepdims, out, initial, where, dtype=dtype)

    def max(
        self,
        axis: Axis = None,
        out: Self | None = None,
        *,
        keepdims: bool = False,
        initial: object = None,
        where: object = True,
    ) -> Self:
        """Return the largest over dims; Partial over sharded dims."""
        return self._reduce(np.max, axis, keepdims, out, initial, where)

    def min(
        self,
        axis: Axis = None,
        out: Self | None = None,
        *,
        keepdims: bool = False,
        initial: object = None,
        where: object = True,
    ) -> Self:
        """Return the smallest over dims; Partial over sharded dims."""
        return self._reduce(np.min, axis, keepdims, out, initial, where)

    def any(self, axis: Axis = None, out: Self | None = None, *, keepdims: bool = False, where: object = True) -> Self:
        """Reduce with "or" over dims; Partial("max") over sharded dims."""
        return self._reduce(np.any, axis, keepdims, out, None, where)

    def all(self, axis: Axis = None, out: Self | None = None, *, keepdims: bool = False, where: object = True) -> Self:
        """Reduce with "and" over dims; Partial("min") over sharded dims."""
        return self._reduce(np.all, axis, keepdims, out, None, where)

    def _reduce(
        self,
        function: Callable[..., object],
        axis: Axis,
        keepdims: bool,
        out: Self | None,
        initial: object,
        where: object,
        **options: object,
    ) -> Self:
        given = {"axis": axis, "keepdims": keepdims, "out": out, "initial": initial, "where": where, **options}
        return self._call(function, **given)  # type: ignore[no-any-return]

    def var(
        self, axis: Axis = None, dtype: npt.DTypeLike | None = None, *, ddof: float = 0, keepdims: bool = False
    ) -> Self:
        """Return the variance over dims; over sharded dims the mean is reduced, and the result is a Partial sum."""
        return self._call(np.var, axis=axis, dtype=dtype, ddof=ddof, keepdims=keepdims)  # type: ignore[no-any-return]

    def std(
        self, axis: Axis = None, dtype: npt.DTypeLike | None = None, *, ddof: float = 0, keepdims: bool = False
    ) -> Self:
        """Return the standard deviation over dims; over sharded dims a collective."""
        return self._call(np.std, axis=axis, dtype=dtype, ddof=ddof, keepdims=keepdims)  # type: ignore[no-any-return]

    # -- along dims that are not sharded ---------------------------------------------------------

    def argmax(self, axis: int | None = None, *, keepdims: bool = False) -> Self:
        """Return the index of the largest element along a dim that is not sharded."""
        return self._call(np.argmax, axis, keepdims=keepdims)  # type: ignore[no-any-return]

    def argmin(self, axis: int | None = None, *, keepdims: bool = False) -> Self:
        """Return the index of the smallest element along a dim that is not sharded."""
        return self._call(np.argmin, axis, keepdims=keepdims)  # type: ignore[no-any-return]

    def argsort(self, axis: int | None = -1, *, stable: bool | None = None) -> Self:
        """Return the indices that sort a dim that is not sharded."""
        return self._call(np.argsort, axis, kind="stable" if stable else None)  # type: ignore[no-any-return]

    def sort(self, axis: int = -1) -> None:
        """Sort along a dim that is not sharded, in place."""
        self._call(np.copyto, self._call(np.sort, axis))

    def cumsum(self, axis: int | None = None, dtype: npt.DTypeLike | None = None) -> Self:
        """Return the sums up to each element along a dim that is not sharded."""
        return self._call(np.cumsum, axis, dtype)  # type: ignore[no-any-return]

    def cumprod(self, axis: int | None = None, dtype: npt.DTypeLike | None = None) -> Self:
        """Return the products up to each element along a dim that is not sharded."""
        return self._call(np.cumprod, axis, dtype)  # type: ignore[no-any-return]

    def take(self, indices: object, axis: int | None = None) -> Self:
        """Take elements along a dim that is not sharded."""
        return self._call(np.take, indices, axis)  # type: ignore[no-any-return]

    def repeat(self, repeats: object, axis: int | None = None) -> Self:
        """Repeat elements along a dim that is not sharded."""
        return self._call(np.repeat, repeats, axis)  # type: ignore[no-any-return]

    # -- shapes ----------------------------------------------------------------------------------

    @property
    def T(self) -> Self:  # noqa: N802 - arrays have it by this name
        """The dims in reverse order; a view."""
        return self.transpose()

    def transpose(self, *axes: int | Sequence[int] | None) -> Self:
        """Return a view with the dims in another order, given as one argument or several.

        No argument reverses the dims.
        """
        return self._call(np.transpose, _ints_from_args(axes) if axes else None)  # type: ignore[no-any-return]

    def reshape(self, *shape: int | Sequence[int]) -> Self:
        """Return the elements in another shape, as a view if possible; nothing is sent.

        The shape may be one argument, or one argument for each dim.

        Raises:
            UsageError: sizes do not fit, or parts would have to move.
        """
        return self._call(np.reshape, _ints_from_args(shape))  # type: ignore[no-any-return]

    def ravel(self) -> Self:
        """Return the elements in one dim, as a view if possible."""
        return self._call(np.ravel)  # type: ignore[no-any-return]

    def flatten(self) -> Self:
        """Return a copy of the elements in one dim."""
        return self.ravel().copy()

    def squeeze(self, axis: Axis = None) -> Self:
        """Return a view without dims of size 1."""
        return self._call(np.squeeze, axis)  # type: ignore[no-any-return]

    def swapaxes(self, axis1: int, axis2: int) -> Self:
        """Return a view with two dims exchanged."""
        return self._call(np.swapaxes, axis1, axis2)  # type: ignore[no-any-return]

    def diagonal(self, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Self:
        """Return the diagonals of two dims that are not sharded."""
        return self._call(np.diagonal, offset, axis1, axis2)  # type: ignore[no-any-return]

    def trace(self, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Self:
        """Return the sums of the diagonals of two dims that are not sharded."""
        return self._call(np.trace, offset, axis1, axis2)  # type: ignore[no-any-return]

    # -- elements --------------------------------------------------------------------------------

    @property
    def real(self) -> Self:
        """The real parts; a copy."""
        return self._call(np.real)  # type: ignore[no-any-return]

    @property
    def imag(self) -> Self:
        """The imaginary parts; a copy."""
        return self._call(np.imag)  # type: ignore[no-any-return]

    def conj(self) -> Self:
        """Return the complex conjugates."""
        return np.conjugate(self)  # type: ignore[call-overload, no-any-return]

    conjugate = conj

    def round(self, decimals: int = 0) -> Self:
        """Round to so many decimals."""
        return self._call(np.round, decimals)  # type: ignore[no-any-return]

    def clip(self, min: object = None, max: object = None) -> Self:  # noqa: A002 - NumPy's names
        """Limit values from below and above; None sets no limit."""
        return self._call(np.clip, min, max)  # type: ignore[no-any-return]

    def dot(self, b: object) -> Self:
        """Return numpy.dot: the product of matrices, the sum of the products of vectors."""
        return self._call(np.dot, b)  # type: ignore[no-any-return]

    def copy(self) -> Self:
        """Return a copy with the same placements."""
        return self._call(np.copy)  # type: ignore[no-any-return]

    def fill(self, value: object) -> None:
        """Write a number everywhere."""
        self._call(np.copyto, value)


def _ints_from_args(given: Sequence[int | Sequence[int] | None]) -> object:
    """Return the integers of arguments that are one sequence, or one integer each."""
    one = given[0] if len(given) == 1 else given
    return one if one is None or isinstance(one, Sequence | np.ndarray) else given
