"""The dtypes that collectives carry, those that they only move, and their names on other ranks."""

from __future__ import annotations

import importlib
from functools import lru_cache

import numpy as np

_KINDS = "biufc"
_EXTENDED = ("bfloat16",)  # names, since the package that defines the dtype may be absent
TIMES = "mM"  # the kinds that travel as 64-bit integers


@lru_cache(maxsize=256)
def dtype_name(dtype: np.dtype) -> str:
    """Return the name that `dtype_from_name` understands, from a cache: NumPy takes microseconds to compose it."""
    if dtype.type in (np.void, np.record):
        return repr(np.lib.format.dtype_to_descr(dtype)) if dtype.names else dtype.str
    return dtype.str if dtype.kind in TIMES else dtype.name


def dtype_from_name(name: str) -> np.dtype:
    """Return the dtype of this name; for bfloat16 and float8 import their package."""
    if name.startswith("["):
        import ast  # here, since it is slow to import and seldom needed

        return np.lib.format.descr_to_dtype(ast.literal_eval(name))
    try:
        return np.dtype(name)
    except TypeError:
        importlib.import_module("ml_dtypes")  # it registers its dtypes with NumPy
        return np.dtype(name)


@lru_cache(maxsize=256)
def dtype_problem(dtype: np.dtype) -> str:
    """Explain why no collective carries a dtype; "" when collectives carry it."""
    if (dtype.kind not in _KINDS or dtype.isbuiltin == 2) and dtype.name not in _EXTENDED:  # 2: it is a package's own
        return f"dtype {dtype}, which no collective carries: use an integer, floating, complex or boolean dtype"
    if not dtype.isnative:
        return f"the foreign byte order dtype {dtype.str}: convert it with x.astype(x.dtype.newbyteorder('='))"
    if dtype.type in (np.longdouble, np.clongdouble):
        return f"dtype {dtype}, whose layout differs between machines"
    return ""


def is_only_moved(dtype: np.dtype) -> bool:
    """Say whether the collectives that move data carry a dtype that the others do not."""
    if integer_for(dtype) is not None:
        return True
    return not dtype.hasobject and dtype.type in (np.void, np.record) and dtype.itemsize > 0


def integer_for(dtype: np.dtype) -> np.dtype | None:
    """Return the integers as which a dtype without arithmetic travels; None for structured dtypes, which are bytes."""
    if dtype.kind in TIMES:
        return np.dtype(np.int64)
    is_extension = dtype.type.__module__.partition(".")[0] == "ml_dtypes"
    return np.dtype(f"u{dtype.itemsize}") if is_extension else None


def how_to_reduce(dtype: np.dtype) -> str:
    """Explain the refusal to reduce a dtype that is only moved, and the remedy."""
    if dtype.kind in TIMES:
        return "which is moved but not reduced: pass x.view('int64'), in which NaT is the least number"
    if integer_for(dtype) is not None:
        return "which is moved but not reduced: pass x.astype('float32'), or another dtype that can hold the result"
    return "which is moved but not reduced: pass its fields one by one, as x['name']"
