"""summary: a table of a module's parameters and buffers, of where their pieces lie, and of their sizes."""

from __future__ import annotations

import math
from typing import NamedTuple

from .module_tree import Buffer, ModuleBase, walk
from .parameter import Parameter
from .split import Split

_HEAD = ("name", "layer", "shape", "dtype", "on this rank", "bytes")


class _Totals(NamedTuple):
    """Sums over all rows.

    Attributes:
        elements: elements of whole parameters.
        trained: those of parameters that require a gradient.
        whole: bytes of whole parameters and buffers.
        values: bytes of parameters and buffers on this rank.
        grads: bytes of the gradients on this rank, as far as they exist.
    """

    elements: int = 0
    trained: int = 0
    whole: int = 0
    values: int = 0
    grads: int = 0


def summarize(root: ModuleBase) -> str:
    """Do the work of `Module.summary`."""
    items = walk(root)
    layers = {name: item for name, item in items if isinstance(item, ModuleBase) and not item.transparent}
    rows: list[tuple[str, ...]] = []
    totals = _Totals()
    for name, item in items:
        if isinstance(item, Parameter | Buffer):
            row, sizes = _row(name, _layer_of(name, layers, root), item)
            rows.append(row)
            totals = _Totals(*(a + b for a, b in zip(totals, sizes, strict=True)))
    lines = _table([_HEAD, *rows])
    lines.append(
        f"{totals.elements:,} elements in parameters, {totals.trained:,} of them trained; the whole takes "
        f"{_bytes(totals.whole)}"
    )
    lines.append(
        f"on this rank: {_bytes(totals.values)} of parameters and buffers, {_bytes(totals.grads)} of gradients that "
        "exist"
    )
    return "\n".join(lines)


def _row(name: str, layer: ModuleBase, item: Parameter | Buffer) -> tuple[tuple[str, ...], _Totals]:
    splits = item.splits if isinstance(item, Parameter) else ()
    deferred = isinstance(item, Parameter) and item.is_deferred
    shape = item.shape if isinstance(item, Parameter) else item.data.shape
    dtype = item.dtype if isinstance(item, Parameter) else item.data.dtype
    whole = splits[0].shape if splits else shape
    here = 0 if deferred else math.prod(shape) * dtype.itemsize
    notes = ["deferred"] if deferred else [f"{shape}: {_place(splits)}"] if splits else ["whole"]
    if isinstance(item, Buffer):
        notes.append("buffer")
    elif not item.requires_grad:
        notes.append("frozen")
    cells = (name, type(layer).__name__, "unknown" if whole is None else str(whole), str(dtype), ", ".join(notes))
    elements = math.prod(shape if whole is None else whole)
    if isinstance(item, Buffer):
        return (*cells, f"{here:,}"), _Totals(whole=elements * dtype.itemsize, values=here)
    return (*cells, f"{here:,}"), _Totals(
        elements=elements,
        trained=elements * item.requires_grad,
        whole=elements * dtype.itemsize,
        values=here,
        grads=0 if item.grad is None else item.grad.nbytes,
    )


def _place(splits: tuple[Split, ...]) -> str:
    """Describe the piece of this rank, from the first division on."""
    parts = []
    for split in splits:
        way = "of a flat row" if split.dim is None else f"along dim {split.dim}"
        parts.append(f"{split.group.rank + 1} of {split.group.world_size} {way} over {split.group.name!r}")
    return ", then ".join(parts)


def _layer_of(name: str, layers: dict[str, ModuleBase], root: ModuleBase) -> ModuleBase:
    """Find the innermost module that holds a parameter of this name."""
    while name:
        name = name.rpartition(".")[0]
        if name in layers:
            return layers[name]
    return layers.get("", root)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1].rjust(widths[-1])]))
    rule = "-" * len(lines[0])
    return [lines[0], rule, *lines[1:], rule]


def _bytes(count: int) -> str:
    """Write a size, with a unit of which there is at least one."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
