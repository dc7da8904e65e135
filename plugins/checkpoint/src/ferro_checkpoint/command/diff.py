"""`ferro checkpoint diff`: two checkpoints, tensor by tensor and value by value."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ferro_checkpoint.command.difference import Difference, difference
from ferro_checkpoint.command.selecting import selected
from ferro_checkpoint.command.source import NamedTensors, bundle_of, opened_source
from ferro_checkpoint.command.text import count, say, say_json, shape_text, short
from ferro_checkpoint.opened.place import COMPLEX128
from ferro_checkpoint.progress import byte_progress

_ONE_OF_THEM = ("only in A", "only in B")


def run(given: argparse.Namespace) -> int:
    """Print what differs; return 0 if nothing does, otherwise 1.

    Raises:
        CheckpointError: one cannot be read.
        UsageError: a pattern chooses no tensor, or there is no such bundle.
    """
    with opened_source(given.a) as a, opened_source(given.b) as b:
        if given.bundle is not None:
            a, b = bundle_of(a, given.bundle), bundle_of(b, given.bundle)
        names = selected(sorted({*a.tensors, *b.tensors}), given.only)
        nbytes = sum(source.tensors[name].nbytes for source in (a, b) for name in names if name in source.tensors)
        tensors = []
        with byte_progress("comparing", nbytes, 0, None) as advance:
            for name in names:
                entry = _compare(name, a, b)
                if entry is not None:
                    tensors.append(entry)
                    if not given.json:
                        say(_text(entry))
                advance(sum(source.tensors[name].nbytes for source in (a, b) if name in source.tensors))
        values = [] if given.only is not None or given.bundle is not None else list(_values(a, b))
    if given.json:
        result = {"a": a.path, "b": b.path, "equal": not tensors and not values, "compared": len(names)}
        say_json(result | {"tensors": tensors, "values": values})
    else:
        for entry in values:
            say(f"{entry['name']}: {entry['what']}{_of_both(entry)}")
        say(_summary(len(names), tensors, values))
    return 1 if tensors or values else 0


def _compare(name: str, a: NamedTensors, b: NamedTensors) -> dict[str, Any] | None:
    """Describe the difference of a tensor; None if there is none."""
    one, other = a.tensors.get(name), b.tensors.get(name)
    if one is None or other is None:
        return {"name": name, "what": _ONE_OF_THEM[one is None]}
    both = {"a": {"dtype": one.dtype, "shape": one.shape}, "b": {"dtype": other.dtype, "shape": other.shape}}
    if one.shape != other.shape:
        return {"name": name, "what": "other shape", **both}
    if one.dtype != other.dtype:
        return {"name": name, "what": "other dtype", **both}
    found = difference(a.pieces(name), b.pieces(name), a.dtype(name))
    return {"name": name, "what": "other elements", **asdict(found)} if found.differing else None


def _values(a: NamedTensors, b: NamedTensors) -> Iterator[dict[str, Any]]:
    """Compare steps and values of two checkpoints; what other formats have beside tensors is about their files."""
    if a.record is None or b.record is None:
        return
    ours, theirs = ({"step": record.step, **record.values} for record in (a.record, b.record))
    ours.pop(COMPLEX128, None)
    theirs.pop(COMPLEX128, None)
    for name in sorted({*ours, *theirs}):
        if name not in ours or name not in theirs:
            yield {"name": name, "what": _ONE_OF_THEM[name not in ours]}
        elif not _same(ours[name], theirs[name]):
            yield {"name": name, "what": "other value", "a": ours[name], "b": theirs[name]}


def _same(a: Any, b: Any) -> bool:
    """Compare JSON values; 1, 1.0 and True are three."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _text(entry: dict[str, Any]) -> str:
    what = entry["what"]
    if what == "other shape":
        return f"{entry['name']}: other shape: {' and '.join(shape_text(entry[one]['shape']) for one in 'ab')}"
    if what == "other dtype":
        return f"{entry['name']}: other dtype: {entry['a']['dtype']} and {entry['b']['dtype']}"
    if what != "other elements":
        return f"{entry['name']}: {what}"
    found = Difference(**{key: value for key, value in entry.items() if key not in ("name", "what")})
    text = f"{entry['name']}: {found.differing:,} of {count(found.elements, 'element')} differ"
    if found.differing > found.not_finite:
        text += f", by {found.largest:.3g} at most, relative {found.largest_relative:.3g}"
    if found.not_finite:
        text += f"; {found.not_finite:,} of them are not finite"
    return text


def _of_both(entry: dict[str, Any]) -> str:
    return f": {short(entry['a'])} and {short(entry['b'])}" if "a" in entry else ""


def _summary(compared: int, tensors: list[dict[str, Any]], values: list[dict[str, Any]]) -> str:
    if not tensors and not values:
        return f"equal: {count(compared, 'tensor')}, bit for bit"
    kinds: dict[str, int] = {}
    for entry in (*tensors, *values):
        kinds[entry["what"]] = kinds.get(entry["what"], 0) + 1
    listed = ", ".join(f"{kind}: {number:,}" for kind, number in kinds.items())
    return f"{len(tensors):,} of {count(compared, 'tensor')} and {count(len(values), 'value')} differ ({listed})"
