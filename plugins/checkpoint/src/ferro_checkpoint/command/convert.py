"""`ferro checkpoint convert`: from other formats to a checkpoint, and from a checkpoint to plain safetensors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from ferro.errors import UsageError
from ferro_checkpoint.command import new_checkpoint, plain_files
from ferro_checkpoint.command.merge import by_bundle
from ferro_checkpoint.command.new_files import ONE_FILE, NewFiles, lay_out
from ferro_checkpoint.command.selecting import selected
from ferro_checkpoint.command.source import ForeignSource, NamedTensors, bundle_of, opened_source
from ferro_checkpoint.command.text import count, say, size_text
from ferro_checkpoint.layout.bundle import FILE_BYTES
from ferro_checkpoint.layout.record import BUNDLE_NAME
from ferro_checkpoint.progress import byte_progress
from ferro_checkpoint.state.values import encode_value

_BUNDLE = "model"
_EACH_ITS_OWN = "*"
_METADATA_OF_FILES = ("format",)  # of plain safetensors: says nothing of the tensors


def run(given: argparse.Namespace) -> int:
    """Convert; return 0.

    Raises:
        UsageError: OUT is there, or options do not go together.
        CheckpointError: IN cannot be read or is damaged, or the file system failed; nothing was written.
    """
    with opened_source(given.source, given.from_) as source:
        to = given.to or ("ferro" if source.record is None and not plain_files.is_file(given.out) else "safetensors")
        writer = new_checkpoint if to == "ferro" else plain_files
        writer.check_out(given.out, overwrite=given.overwrite)
        if isinstance(source, ForeignSource):
            for name, reason in source.source.unreadable.items():
                print(f"ferro checkpoint: left out {name!r}: {reason}", file=sys.stderr)  # noqa: T201
        new = _to_checkpoint(source, given) if to == "ferro" else _to_plain(source, given)
        say(f"{given.out}: {count(sum(len(it.tensors) for it in new.files), 'tensor')}, {size_text(new.nbytes)}")
    return 0


def _to_checkpoint(source: NamedTensors, given: argparse.Namespace) -> NewFiles:
    names = selected(source.tensors, given.only)
    if source.record is not None and given.bundle is not None:
        own = set(selected(source.tensors, [given.bundle]))
        names = [name for name in names if name in own]
    if source.record is not None or given.bundle == _EACH_ITS_OWN:
        bundles = by_bundle(names)
    else:
        bundles = {given.bundle or _BUNDLE: dict(zip(names, names, strict=True))}
    for bundle, its in bundles.items():
        if not BUNDLE_NAME.fullmatch(bundle) or "" in its:
            raise UsageError(f"{bundle!r} cannot be the name of a bundle: give one by --bundle")
    new = lay_out(source, bundles, FILE_BYTES)
    a_part = given.only is not None or (source.record is not None and given.bundle is not None)
    values = {} if a_part else _values(source)
    step = None if source.record is None else source.record.step
    with byte_progress("writing", new.nbytes, 0, None) as advance:
        new_checkpoint.write_checkpoint(given.out, new, values, step, overwrite=given.overwrite, progress=advance)
    return new


def _values(source: NamedTensors) -> Mapping[str, Any]:
    if source.record is not None:
        return source.values
    values = {name: value for name, value in source.values.items() if name not in _METADATA_OF_FILES}
    return {name: encode_value(value, name) for name, value in values.items()}


def _to_plain(source: NamedTensors, given: argparse.Namespace) -> NewFiles:
    if given.bundle is not None:
        if source.record is None:
            raise UsageError(f"--bundle {given.bundle}: {source.path} is no checkpoint and has no bundles")
        source = bundle_of(source, given.bundle)
    names = selected(source.tensors, given.only)
    file_bytes = ONE_FILE if plain_files.is_file(given.out) else FILE_BYTES
    new = lay_out(source, {_BUNDLE: dict(zip(names, names, strict=True))}, file_bytes)
    if not new.files:
        raise UsageError(f"{source.path} has no tensors")
    with byte_progress("writing", new.nbytes, 0, None) as advance:
        plain_files.write_plain(given.out, new, overwrite=given.overwrite, progress=advance)
    return new
