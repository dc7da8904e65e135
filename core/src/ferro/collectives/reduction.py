"""The arithmetic of every reduction.

Half precision is accumulated in float32 and rounded once. A mean is a sum divided by the number of ranks, before that
rounding. Infinities and NaN are results like others: neither `np.errstate` nor the warnings filter of the program
changes what a named reduction does. A function of the user's runs as it would elsewhere in the program.
"""

from __future__ import annotations

import builtins
import operator
import threading
from collections.abc import Callable, Sequence
from contextvars import Context
from functools import lru_cache
from typing import TypeAlias, cast

import numpy as np

from ferro.collectives.half import reduce_half_precision
from ferro.errors import FerroError, UnsupportedError, UsageError
from ferro.types import Array, ReduceOp

# A function (a, b, out) of one-dimensional pieces of the arrays; it writes into `out`, or returns a new array.
ReduceFunction: TypeAlias = "Callable[[Array, Array, Array], object]"

_UFUNCS: dict[ReduceOp, np.ufunc] = {
    ReduceOp.SUM: np.add,
    ReduceOp.MEAN: np.add,
    ReduceOp.PROD: np.multiply,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
    ReduceOp.BAND: np.bitwise_and,
    ReduceOp.BOR: np.bitwise_or,
    ReduceOp.BXOR: np.bitwise_xor,
}
# Functions that users pass for a named reduction; each but NumPy's ufuncs would fail with the arguments (a, b, out).
_SAME: dict[object, ReduceOp] = {ufunc: op for op, ufunc in _UFUNCS.items() if op is not ReduceOp.MEAN}
_SAME |= {function: op for op in ReduceOp for module in (np, builtins) if (function := getattr(module, op, None))}
_SAME |= {np.amin: ReduceOp.MIN, np.amax: ReduceOp.MAX, operator.add: ReduceOp.SUM, operator.mul: ReduceOp.PROD}
_SAME |= {operator.and_: ReduceOp.BAND, operator.or_: ReduceOp.BOR, operator.xor: ReduceOp.BXOR}
_FUNCTION = "a function (a, b, out) that writes its result into out or returns it"
_HALF_PRECISION = ("float16", "bfloat16")
_VECTORS = 16  # complex numbers: a multiple of what NumPy multiplies at once, unrolled, on any processor
_WIDENED = (ReduceOp.SUM, ReduceOp.MEAN, ReduceOp.PROD)
_ORDERED = (ReduceOp.MIN, ReduceOp.MAX)
_BITWISE = (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR)


def _run_quietly(function: Callable[..., object], *arguments: object, **options: object) -> object:
    with np.errstate(all="ignore"):
        return function(*arguments, **options)


class _Quiet(threading.local):
    """Runs a ufunc without warnings and errors of floating-point numbers; each thread has its own.

    NumPy 2 keeps its settings in context variables, and a context that is ready takes a quarter of the time of
    `np.errstate`. It must run nothing but a ufunc, for a context cannot be entered twice.
    """

    def __init__(self) -> None:
        self.run: Callable[..., object] = _run_quietly
        if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
            self.run = Context().run
            self.run(np.seterr, all="ignore")


_quiet = _Quiet()


def reduction_for(op: ReduceOp | str | ReduceFunction, dtype: np.dtype, ranks: int) -> Reduction:
    """Make the reduction `op`, or take it from a cache if `op` is a name."""
    return _named_reduction(op, dtype, ranks) if isinstance(op, str) else Reduction(op, dtype, ranks)


@lru_cache(maxsize=256)
def _named_reduction(op: str, dtype: np.dtype, ranks: int) -> Reduction:
    return Reduction(op, dtype, ranks)


class Reduction:
    """A reduction over one dtype, for a given number of ranks.

    Attributes:
        op: the operation, None for a user's function.
        name: the operation's name, "callable" for a user's function.
        ufunc: NumPy's function of two operands, which leaves a mean to be completed; None for a user's function.
        needs_all: True when the result is right only if one call combines all contributions, in order of rank: half
            precision, whose partial results must not be rounded, and users' functions, which may not be commutative.

    Which operand the result is written over depends on the rank. It must not decide what is computed: NumPy takes
    another loop for one element that is written over its first operand, with other bits for NaN and complex numbers,
    and a user's function may read an operand after it has begun to write. Such results get memory of their own.
    """

    def __init__(self, op: ReduceOp | str | ReduceFunction, dtype: np.dtype, ranks: int) -> None:
        """Raise UsageError if no operation has the name `op`, UnsupportedError if it is not defined for `dtype`."""
        self.dtype = dtype
        self.ranks = ranks
        self.op = _named(op)
        self.name = "callable" if self.op is None else self.op.value
        self.ufunc = ufunc = None if self.op is None else _UFUNCS[self.op]
        self._function = _function(op, dtype) if ufunc is None else _quiet_function(ufunc, dtype)
        self._apart = self.op is None  # `out` is never an operand
        if self.op is ReduceOp.PROD and dtype.kind == "c":
            self._function, self._apart = _complex_product, True
        if self.op is not None:
            _check(self.op, dtype)
        self._is_mean = self.op is ReduceOp.MEAN
        # The function on float32 by which half precision is reduced.
        self._widened = ufunc if self.op in _WIDENED and dtype.name in _HALF_PRECISION else None
        self.needs_all = self._widened is not None or self.op is None

    def combine(self, operands: Sequence[Array], own: int, *, at_once: bool) -> None:
        """Reduce `operands`, left to right, into `operands[own]`; the others are scratch memory.

        Args:
            operands: one-dimensional and of equal length, in order of rank.
            own: the index of the operand that takes the result.
            at_once: the operands are all contributions; a mean is completed.
        """
        if self._widened is not None:
            self.into(operands[own], operands, at_once=at_once)
            return
        if self._is_apart(operands[0]):
            self._reduce_apart(operands, operands[own])
        else:
            total = operands[0]
            for index in range(1, len(operands)):
                out = operands[own] if index >= own else total
                self._function(total, operands[index], out)
                total = out
        if at_once:
            self.finish(operands[own])

    def into(self, out: Array, operands: Sequence[Array], *, at_once: bool) -> None:
        """Reduce `operands`, left to right, into `out`, with the same bits as `combine`.

        Args:
            out: takes the result. It overlaps no operand, or is one of the first two itself.
            operands: at least one; one-dimensional, of equal length, in order of rank. No operand but `out` is
                changed.
            at_once: the operands are all contributions; a mean is completed.
        """
        if self._widened is not None:
            reduce_half_precision(self._widened, operands, out, self.ranks if at_once and self._is_mean else 1)
            return
        count = len(operands)
        if count > 1 and self._is_apart(out):
            self._reduce_apart(operands, out)
        elif count > 1:
            self._function(operands[0], operands[1], out)
            for index in range(2, count):
                self._function(out, operands[index], out)
        elif out is not operands[0]:
            out[...] = operands[0]
        if at_once and self._is_mean:
            self.finish(out)

    def finish(self, result: Array) -> None:
        """Complete a mean of which `result` is the sum, in place."""
        if self._is_mean:
            # NumPy divides complex numbers by complex ones: it would round twice, and make NaN of infinities.
            numbers = result.view(result.real.dtype) if self.dtype.kind == "c" else result
            _quiet.run(np.true_divide, numbers, self.ranks, out=numbers)

    def _is_apart(self, operand: Array) -> bool:
        """Say whether the result must not be written over an operand."""
        return self._apart or (operand.size == 1 and self.dtype.kind not in "iub")

    def _reduce_apart(self, operands: Sequence[Array], out: Array) -> None:
        """Reduce operands, left to right, and then copy the result to `out`."""
        total = operands[0]
        for operand in operands[1:]:
            # An array on a device need not know NumPy's function.
            result = np.empty_like(total) if isinstance(total, np.ndarray) else total.copy()
            self._function(total, operand, result)
            total = result
        if total is not out:
            out[...] = total


def _named(op: ReduceOp | str | ReduceFunction) -> ReduceOp | None:
    if isinstance(op, str):
        try:
            return ReduceOp(op)
        except ValueError:
            names = ", ".join(ReduceOp)
            raise UsageError(f"unknown reduction {op!r}: use one of {names}, or {_FUNCTION}") from None
    if not callable(op):
        raise UsageError(f"a reduction is a name, such as 'sum', or {_FUNCTION}, not {op!r}")
    return next((named for function, named in _SAME.items() if function is op), None)


def _quiet_function(ufunc: np.ufunc, dtype: np.dtype) -> ReduceFunction:
    """Make a function (a, b, out) of a named reduction's ufunc, which takes `out` by its name only."""
    if dtype.kind in "iub":  # integers never warn here
        return lambda a, b, out: ufunc(a, b, out=out)
    return lambda a, b, out: _quiet.run(ufunc, a, b, out=out)


def _complex_product(a: Array, b: Array, out: Array) -> None:
    """Multiply complex numbers; `out` overlaps neither factor.

    NumPy's vectorized loop does not round the products before it subtracts them (fused multiply-add), and its loop for
    the last elements does. So these are multiplied in a longer array: the bits must not depend on how an algorithm cuts
    the arrays. A device has one way for all elements.
    """
    whole = a.size - a.size % _VECTORS if isinstance(a, np.ndarray) else a.size
    _quiet.run(np.multiply, a[:whole], b[:whole], out=out[:whole])
    if rest := a.size - whole:
        padded = np.ones_like(a, shape=(2, _VECTORS))
        padded[0, :rest], padded[1, :rest] = a[whole:], b[whole:]
        product = np.empty_like(padded[0])
        _quiet.run(np.multiply, padded[0], padded[1], out=product)
        out[whole:] = product[:rest]


def _function(op: object, dtype: np.dtype) -> ReduceFunction:
    """Make a function (a, b, out) of a user's function or ufunc."""
    assert callable(op)
    name = getattr(op, "__qualname__", None) or getattr(op, "__name__", None) or repr(op)
    if isinstance(op, np.ufunc):
        if (op.nin, op.nout) != (2, 1):
            raise UsageError(f"op={name} takes {op.nin} arrays and gives {op.nout}: use a name, or {_FUNCTION}")
        nothing = np.empty(0, dtype)
        try:
            op(nothing, nothing, out=nothing)
        except TypeError as error:
            raise UnsupportedError(f"op={name} is not defined for {dtype}: {error}") from None
        return lambda a, b, out: op(a, b, out=out)
    _check_parameters(op, name)

    def call_function(a: Array, b: Array, out: Array) -> None:
        try:
            result = op(a, b, out)
        except FerroError as error:  # it must not be taken for the backend's
            raise RuntimeError(f"the function given as op, {name}, raised {type(error).__name__}: {error}") from error
        except Exception as error:
            error.add_note(f"(in the function given as op, {name})")
            raise
        if not (result is out or result is None or isinstance(result, int)):  # functions of C return an int
            _take_result(result, out, name)

    return call_function


def _take_result(result: object, out: Array, name: str) -> None:
    """Copy an array that a user's function returned in place of writing into `out`."""
    array = cast("Array", result) if hasattr(result, "shape") else np.asarray(result)
    if array.shape != out.shape or not np.can_cast(array.dtype, out.dtype, "same_kind"):
        raise RuntimeError(
            f"the function given as op, {name}, returned {array.dtype}{array.shape} in place of "
            f"{out.dtype}{out.shape}: it must write its result into out, or return it"
        )
    out[...] = array


def _check_parameters(op: Callable[..., object], name: str) -> None:
    """Refuse a function that does not take the three arguments (a, b, out)."""
    from inspect import signature  # here, since it is slow to import and seldom needed

    try:
        parameters = signature(op)
    except (TypeError, ValueError):
        return  # some built-in functions do not tell theirs
    try:
        parameters.bind(None, None, None)
    except TypeError:
        raise UsageError(f"op={name}{parameters}: a reduction is a name, such as 'sum', or {_FUNCTION}") from None


def _check(op: ReduceOp, dtype: np.dtype) -> None:
    """Refuse a reduction that is not defined for a dtype."""
    kind = dtype.kind
    floating = kind in "fc" or dtype.name == "bfloat16"
    if op is ReduceOp.MEAN and not floating:
        remedy = "convert to a floating dtype first, or use op='sum'"
    elif op in _BITWISE and kind not in "iub":
        remedy = "bitwise reductions take integers and booleans"
    elif op in _ORDERED and kind == "c":
        remedy = "complex numbers have no order"
    else:
        return
    raise UnsupportedError(f"op={op.value!r} is not defined for {dtype.name}: {remedy}", op=op.value)
