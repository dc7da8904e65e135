"""`ferro checkpoint inspect`: the tensors and values of a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from ferro.errors import UsageError
from ferro_checkpoint.command import listing
from ferro_checkpoint.command.provenance import about
from ferro_checkpoint.command.selecting import selected
from ferro_checkpoint.command.source import NamedTensors, opened_source
from ferro_checkpoint.command.text import count, say, say_json, say_table, shape_text, short, size_text


def run(given: argparse.Namespace) -> int:
    """Print what a checkpoint holds, or which checkpoints a directory holds; return 0.

    Raises:
        CheckpointError: there is neither, or it cannot be read.
        UsageError: a pattern chooses no tensor, or tensors of a directory of checkpoints.
    """
    found = listing.checkpoints_in(given.dir)
    if found:
        if given.only is not None:
            which = ", ".join(it.name for it in found[-3:])
            raise UsageError(f"--only: {given.dir} is a directory of checkpoints: choose one of {which}")
        listing.show(given.dir, found, as_json=given.json)
        return 0
    with opened_source(given.dir) as source:
        names = selected(source.tensors, given.only)
        if given.json:
            say_json(_content(source, names))
        else:
            _show(source, names, with_values=given.only is None)
    return 0


def _content(source: NamedTensors, names: list[str]) -> dict[str, Any]:
    record = source.record
    tensors = [
        {"name": name, "dtype": it.dtype, "shape": it.shape, "bytes": it.nbytes, "file": it.file}
        for name in names
        for it in (source.tensors[name],)
    ]
    content: dict[str, Any] = {"path": source.path, "kind": source.kind, "tensors": tensors}
    if record is not None:
        content |= {
            "step": record.step,
            "saved_by": record.saved_by,
            "files": {name: it.nbytes for name, it in record.files.items()},
        }
    return content | {"values": source.values}


def _show(source: NamedTensors, names: list[str], *, with_values: bool) -> None:
    record = source.record
    say(f"{source.path}: {source.kind if record is None else about(record)}")
    if names:
        rows = [
            (name, it.dtype, shape_text(it.shape), size_text(it.nbytes), it.file or "")
            for name in names
            for it in (source.tensors[name],)
        ]
        say_table([("tensor", "dtype", "shape", "size", "file"), *rows], right=(3,))
    nbytes = sum(source.tensors[name].nbytes for name in names)
    files = "" if record is None else f" in {count(len(record.files), 'file')}"
    part = "" if len(names) == len(source.tensors) else f" of {len(source.tensors):,}"
    say(f"{count(len(names), 'tensor')}{part}, {size_text(nbytes)}{'' if part else files}")
    if with_values and source.values:
        say()
        say_table([("value", ""), *((name, short(value)) for name, value in sorted(source.values.items()))])
