"""Conformance of scan and exscan, of min_loc and max_loc."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro import ProcessGroup
from ferro_testing.case import Case
from ferro_testing.samples import Findings, noise, reduced, reductions, sample

_COUNTS = (0, 1, 7, 3_000)


def check_prefixes(case: Case) -> None:
    """Rank r gets the reduction of the ranks up to r (scan), or before r (exscan), in order of rank."""
    if case.supports("all_to_all"):
        case.verify_all(_scan, case.carried("all_to_all"))


def check_extrema(case: Case) -> None:
    """The least and the greatest elements come with the lowest ranks that have them; NaN is both."""
    if case.supports("all_to_all", "all_gather"):
        dtypes = [dtype for dtype in case.carried("all_to_all", "all_gather") if "min" in reductions(dtype)]
        case.verify_all(_find_extrema, dtypes)


def _scan(group: ProcessGroup, dtypes: Sequence[str]) -> list[str]:
    found, me = Findings(group.rank), group.rank
    for dtype in dtypes:
        for index, name in enumerate(name for name in reductions(dtype) if name != "mean"):
            count = _COUNTS[(index + len(dtype)) % len(_COUNTS)]
            rows = [sample(rank, (count,), dtype) for rank in range(group.world_size)]
            if name == "sum" and dtype.startswith(("float", "bfloat")):  # the order matters, and the rounding
                rows = [noise(rank, count, dtype) for rank in range(group.world_size)]
            what = f"of {count} {dtype} op={name}"
            found.same(group.scan(rows[me], name), reduced(rows[: me + 1], name), f"scan {what}")
            before = group.exscan(rows[me], name)
            if me:
                found.same(before, reduced(rows[:me], name), f"exscan {what}")
            else:  # the value that changes nothing
                combined = reduced([np.asarray(before), rows[0]], name)
                found.same(combined, rows[0], f"exscan {what}, combined with the rank's own")
    return found.report()


def _find_extrema(group: ProcessGroup, dtypes: Sequence[str]) -> list[str]:
    found, me = Findings(group.rank), group.rank
    for index, dtype in enumerate(dtypes):
        for count in (7, _COUNTS[index % len(_COUNTS)]):
            rows = [sample(rank, (count,), dtype) for rank in range(group.world_size)]
            if "float" in dtype and count:
                rows = [row.copy() for row in rows]
                rows[-1][0] = np.nan
            for name, call, search in (("min_loc", group.min_loc, np.argmin), ("max_loc", group.max_loc, np.argmax)):
                values, ranks = call(rows[me])
                stacked = np.stack(rows)
                places = search(stacked, axis=0).astype(np.int64)
                found.same(ranks, places, f"{name} of {count} {dtype}: ranks")
                wanted = np.take_along_axis(stacked, places[None], 0)[0]
                found.same(values, wanted, f"{name} of {count} {dtype}: values")
    return found.report()
