"""Cells of the tables: each cell is one kind of call, with its result on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ferro_testing.differences import MOVING, REDUCING
from ferro_testing.samples import reductions

Status: TypeAlias = Literal["ok", "refused", "wrong", "unknown"]

# In the order of the tables. A sendrecv stands for the transfers of which it is made.
COLUMNS = (*REDUCING, *MOVING, "sendrecv")
PLAIN = ("barrier", "split", "subgroup")  # operations that move no array of the caller's


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One kind of call, and its result.

    Attributes:
        op: the operation.
        dtype: name of the elements' type; "" where there are none.
        reduction: name of the reduction; "" where there is none.
        status: "ok", "refused" (by UnsupportedError, on all ranks), "wrong", or "unknown" when
            the group had died before.
        text: the reason for a status other than "ok".
    """

    op: str
    dtype: str = ""
    reduction: str = ""
    status: Status = "unknown"
    text: str = ""


def all_cells(dtypes: Sequence[str]) -> list[Cell]:
    """Return every kind of call to try, in order, each with the status "unknown"."""
    cells = [Cell(op=op) for op in PLAIN]
    for dtype in dtypes:
        for op in COLUMNS:
            names = reductions(dtype) if op in REDUCING else ("",)
            cells += [Cell(op=op, dtype=dtype, reduction=name) for name in names]
    return cells


def merge(cells: Sequence[Cell], told: Sequence[Sequence[Sequence[str]]]) -> list[Cell]:
    """Return the cells with the results of all ranks.

    Args:
        cells: the calls that were tried.
        told: for each rank, the status and text of every cell.
    """
    merged = []
    for index, cell in enumerate(cells):
        status, text = _combined_status([(rank[index][0], rank[index][1]) for rank in told])
        merged.append(Cell(op=cell.op, dtype=cell.dtype, reduction=cell.reduction, status=status, text=text))
    return merged


def _combined_status(answers: Sequence[tuple[str, str]]) -> tuple[Status, str]:
    """Return the status of a cell, and its reason, from the results of all ranks."""
    statuses = [status for status, _ in answers]
    for status, text in answers:
        if status == "wrong":
            return "wrong", text
    refused = [rank for rank, status in enumerate(statuses) if status == "refused"]
    if len(refused) == len(answers):
        return "refused", answers[0][1]
    if refused:
        return "wrong", f"UnsupportedError on ranks {refused} only: {answers[refused[0]][1]}"
    return ("ok", "") if set(statuses) == {"ok"} else ("unknown", "the group had died before")


def gaps(cells: Iterable[Cell]) -> dict[str, str]:
    """Return all refusals as the fewest keys for `Case.unsupported`, with the reasons."""
    by_op: dict[str, list[Cell]] = {}
    for cell in cells:
        by_op.setdefault(cell.op, []).append(cell)
    found: dict[str, str] = {}
    for op, tried in by_op.items():
        found.update(_gaps_of(op, tried))
    return found


def _gaps_of(op: str, cells: Sequence[Cell]) -> Mapping[str, str]:
    """Return one operation's gaps: the operation, or else whole dtypes, reductions, single calls."""
    found: dict[str, str] = {}
    if all(cell.status == "refused" for cell in cells):
        return {op: cells[0].text}
    left = [cell for cell in cells if cell.status == "refused"]
    for kind in ("dtype", "reduction"):
        for name in dict.fromkeys(getattr(cell, kind) for cell in left):
            alike = [cell for cell in cells if getattr(cell, kind) == name]
            if name and all(cell.status == "refused" for cell in alike):
                found[f"{op}:{name}"] = alike[0].text
                left = [cell for cell in left if getattr(cell, kind) != name]
    for cell in left:
        found[f"{op}:{cell.dtype}:{cell.reduction}"] = cell.text
    return found
