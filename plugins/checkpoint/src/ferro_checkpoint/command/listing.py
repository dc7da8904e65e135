"""A directory of checkpoints: which it holds, and whether each is whole."""

from __future__ import annotations

from dataclasses import dataclass

from ferro_checkpoint.command.provenance import saved_at
from ferro_checkpoint.command.text import count, say, say_json, say_table, size_text
from ferro_checkpoint.errors import CheckpointError, StateError
from ferro_checkpoint.layout.bundle import SUFFIX
from ferro_checkpoint.layout.record import RECORD_NAME, Record
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.storage.opening import open_storage, split_path
from ferro_checkpoint.storage.storage import Storage


@dataclass(frozen=True, slots=True)
class Listed:
    """A checkpoint of a directory.

    Attributes:
        name: of its own directory.
        record: None if it cannot be opened.
        fault: why it cannot be; "" if it can.
    """

    name: str
    record: Record | None
    fault: str


def checkpoints_in(path: str) -> list[Listed]:
    """List the checkpoints of a directory, older steps first; [] if it is one itself, or none of them.

    A directory without a record is listed if there are files of tensors in it: it may be a save that did not end.
    """
    try:
        parent, own_name = split_path(path)
        if RECORD_NAME in parent.files(own_name):
            return []
        storage = open_storage(path)
        names = storage.names()
    except (CheckpointError, StateError):
        return []
    files = {name: storage.files(name) for name in names}
    if not any(RECORD_NAME in its for its in files.values()):
        return []
    listed = [
        _listed(storage, name)
        for name, its in files.items()
        if RECORD_NAME in its or any(file.endswith(SUFFIX) for file in its)
    ]
    return sorted(listed, key=lambda it: (it.record.step or 0 if it.record else 0, it.name))


def _listed(storage: Storage, name: str) -> Listed:
    try:
        with OpenedCheckpoint.open(storage, name) as opened:
            return Listed(name, opened.record, "")
    except CheckpointError as error:
        return Listed(name, None, str(error))


def show(path: str, found: list[Listed], *, as_json: bool) -> None:
    """Print the list."""
    if as_json:
        say_json({"path": path, "kind": "directory", "checkpoints": [_content(it) for it in found]})
        return
    rows = [("checkpoint", "step", "saved", "size", "whole")]
    for it in found:
        record = it.record
        step = "" if record is None or record.step is None else str(record.step)
        saved, size = ("", "") if record is None else (saved_at(record), size_text(_bytes(record)))
        rows.append((it.name, step, saved, size, "no" if it.fault else "yes"))
    say_table(rows, right=(1, 3))
    for it in found:
        if it.fault:
            say(it.fault)
    whole = sum(not it.fault for it in found)
    say(f"{count(len(found), 'checkpoint')}, {whole} whole by records, headers and lengths; `verify` reads every byte")


def _content(it: Listed) -> dict[str, object]:
    content: dict[str, object] = {"name": it.name, "whole": not it.fault, "fault": it.fault or None}
    if it.record is not None:
        content |= {"step": it.record.step, "saved_by": it.record.saved_by, "bytes": _bytes(it.record)}
    return content


def _bytes(record: Record) -> int:
    return sum(its.nbytes for its in record.files.values())
