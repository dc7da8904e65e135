"""The function that the ranks of `ferro conformance` run: every call once, and some calls for timings."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

from ferro import ProcessGroup
from ferro.errors import UnsupportedError, UsageError
from ferro.types import Array, Device
from ferro_testing.samples import Findings
from ferro_testing.single_call import Placement, expected_result, prepare_call, unchanged

_CALL_S = 10.0
SMALL_BYTES, LARGE_BYTES = 1 << 10, 1 << 20
_CALLS = {SMALL_BYTES: 40, LARGE_BYTES: 8}
_TIMED = "float32"


def probe(group: ProcessGroup, cells: Sequence[Sequence[str]], device: str) -> dict[str, object]:
    """Do every call of `cells` once and compare; return their statuses, and timings.

    Args:
        group: the ranks, all of which run this.
        cells: op, dtype and reduction of each.
        device: where the arrays are to be.
    """
    place, fetch = _device(device)
    told: list[list[str]] = []
    alive = True
    for op, dtype, reduction in cells:
        if not alive:
            told.append(["unknown", ""])
            continue
        status, text, alive = _try(group, op, dtype, reduction, place, fetch)
        told.append([status, text])
    timings = _measure(group, cells, told, place) if alive else []
    return {"cells": told, "timings": timings}


def _try(
    group: ProcessGroup, op: str, dtype: str, reduction: str, place: Placement, fetch: Placement
) -> tuple[str, str, bool]:
    """Do one call; return status, text, and whether the group is still good."""
    what = " ".join(filter(None, (op, dtype, reduction)))
    try:
        if op == "split":
            _close(group.split(0, timeout_s=_CALL_S))
            return "ok", "", True
        if op == "subgroup":
            _close(group.subgroup(range(group.world_size), timeout_s=_CALL_S))
            return "ok", "", True
        call = prepare_call(group, op, dtype or _TIMED, reduction, place=place, timeout_s=_CALL_S)
        result: Any = call()
    except UnsupportedError as error:
        return "refused", str(error), True
    except UsageError as error:
        return "wrong", f"{what}: rank {group.rank} raised UsageError: {error}", True
    except Exception as error:  # noqa: BLE001 - a stranger's backend raises what it likes
        return "wrong", f"{what}: rank {group.rank} raised {type(error).__name__}: {error}", False
    found = Findings(group.rank)
    wanted = None if op == "barrier" else expected_result(group, op, dtype, reduction)
    if wanted is None:
        found.true(result is None, f"{what}: not None where there is no result")
    else:
        found.same(fetch(result), wanted, what)
    report = found.report()
    return ("wrong", report[0], True) if report else ("ok", "", True)


def _close(group: ProcessGroup | None) -> None:
    if group is not None:
        group.close()


def _device(name: str) -> tuple[Placement, Placement]:
    """Return a function that puts an array on a device, and one that brings a result back."""
    if name == Device.CPU:
        return unchanged, unchanged
    cupy: Any = importlib.import_module("cupy")

    def place(array: Array) -> object:
        try:
            return cupy.asarray(array)
        except (TypeError, ValueError) as error:
            raise UnsupportedError(f"CuPy has no arrays of {array.dtype}: {error}") from error

    return place, cupy.asnumpy


def _measure(
    group: ProcessGroup, cells: Sequence[Sequence[str]], told: Sequence[Sequence[str]], place: Placement
) -> list[list[object]]:
    """Return operation, and median seconds of a small and of a large call, of all operations that work."""
    timings: list[list[object]] = []
    for (op, dtype, reduction), (status, _) in zip(cells, told, strict=True):
        plain = op == "barrier" or (dtype == _TIMED and reduction in ("", "sum"))
        if plain and status == "ok":
            medians = [_median_s(group, op, nbytes, place) for nbytes in _CALLS]
            timings.append([op, *(medians if op != "barrier" else (medians[0], None))])
    return timings


def _median_s(group: ProcessGroup, op: str, nbytes: int, place: Placement) -> float:
    """Return the median seconds of a call in which this rank gives `nbytes` bytes."""
    parts = group.world_size if op in ("reduce_scatter", "scatter", "all_to_all") else 1
    count = max(1, nbytes // 4 // parts)
    call = prepare_call(group, op, _TIMED, "sum", count=count, place=place, timeout_s=_CALL_S)
    seconds = []
    for _ in range(_CALLS[nbytes]):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
