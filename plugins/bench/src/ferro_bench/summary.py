"""The record of a measured case, ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import numpy as np

from ferro_bench.measure import Measured
from ferro_bench.rank.case import BUS_FACTORS, BenchCase
from ferro_bench.rank.pattern import dtype_of

_GB = 1e9


class Result(TypedDict):
    """One contestant's times, in seconds, over all calls of all counted turns.

    `algbw_gb_s` is the whole buffer's size over the median, in 1e9 bytes a second; `busbw_gb_s`
    is `algbw_gb_s` times nccl-tests' factor. `wrong` counts elements of wrong results.
    """

    median_s: float
    min_s: float
    p10_s: float
    p90_s: float
    algbw_gb_s: float
    busbw_gb_s: float
    wrong: int


class BenchRecord(TypedDict):
    """One case with every contestant's result, by name."""

    collective: str
    ranks: int
    nbytes: int
    count: int
    dtype: str
    op: str
    calls: int
    rounds: int
    async_op: bool
    apart: bool
    checked: bool
    results: dict[str, Result]


def summarize(case: BenchCase, world_size: int, measured: Mapping[str, Measured]) -> BenchRecord:
    """Summarize the times of a case."""
    nbytes = case.count * dtype_of(case.dtype).itemsize
    factor = BUS_FACTORS[case.collective](world_size)
    results = {name: _result(it, nbytes, factor) for name, it in measured.items()}
    return BenchRecord(
        collective=case.collective,
        ranks=world_size,
        nbytes=nbytes,
        count=case.count,
        dtype=case.dtype,
        op=case.op,
        calls=case.calls,
        rounds=max(len(it.seconds) for it in measured.values()),
        async_op=case.async_op,
        apart=case.apart,
        checked=case.check,
        results=results,
    )


def _result(measured: Measured, nbytes: int, factor: float) -> Result:
    low, middle, high = (float(q) for q in np.quantile(measured.seconds, [0.1, 0.5, 0.9]))
    return Result(
        median_s=middle,
        min_s=float(measured.seconds.min()),
        p10_s=low,
        p90_s=high,
        algbw_gb_s=nbytes / middle / _GB,
        busbw_gb_s=nbytes / middle / _GB * factor,
        wrong=measured.wrong,
    )
