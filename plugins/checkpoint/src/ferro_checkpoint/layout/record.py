"""ferro.json, the commit record: written last, so a directory that has it is a whole checkpoint.

It holds the step, all values of the state that are no arrays, and for each file its length and the digests of its
segments. A segment is a range of a file that one rank has written; segments follow each other from the file's first
byte to its last. The record's own digest covers all of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointTooNew, StateError
from ferro_checkpoint.layout.json_text import UnreadableJson, check_counts, check_depth, read_json, shown, write_json

RECORD_NAME = "ferro.json"
MOST_RECORD_BYTES = 256 << 20
VERSION = 1
BUNDLE_NAME = re.compile(r"[A-Za-z0-9_-]+")
_ADVICE = "save large values as arrays"
_FORMAT = "ferro-checkpoint"
_FILE_NAME = re.compile(r"[^/\\\0]+")
_MOST_BYTES = 1 << 62


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the record says of a file.

    Attributes:
        nbytes: its length.
        ends: one more than the last byte of each segment; they grow, and the last one is `nbytes`.
        digests: of each segment, in hexadecimal (see `layout.digest`).
    """

    nbytes: int
    ends: tuple[int, ...]
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The contents of the record.

    Attributes:
        step: the training's step, or None.
        bundles: the names of the bundles' files, by bundle.
        files: all files but the record, by name.
        values: of the state, as JSON, by their path in it, such as "config.lr".
        digest: the algorithm of the digests.
        saved_by: about the program that wrote it: "ferro", "world_size" and so on.
    """

    step: int | None
    bundles: Mapping[str, tuple[str, ...]]
    files: Mapping[str, FileRecord]
    values: Mapping[str, Any]
    digest: str
    saved_by: Mapping[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Write the record as JSON.

        Raises:
            StateError: no reader would take it: the step is no int, or the values are too many, or nested too deeply.
        """
        if type(self.step) not in (int, type(None)):
            raise StateError(f"step is {shown(self.step)}, of type {type(self.step).__name__}: give an int")
        content = {
            "format": _FORMAT,
            "version": VERSION,
            "step": self.step,
            "saved_by": dict(self.saved_by),
            "digest": self.digest,
            "bundles": {name: list(files) for name, files in self.bundles.items()},
            "files": {
                name: {"bytes": one.nbytes, "ends": list(one.ends), "digests": list(one.digests)}
                for name, one in self.files.items()
            },
            "values": self.values,
        }
        try:
            check_depth(content)
            text = write_json(content | {"record_digest": _digest(content)})
            check_counts(text)
        except UnreadableJson as error:
            raise StateError(f"the commit record cannot be written: {error}: {_ADVICE}") from error
        except (TypeError, ValueError, RecursionError) as error:  # of the module `json`
            raise StateError(f"the commit record cannot be written: a value is no JSON: {error}") from error
        if len(text) > MOST_RECORD_BYTES:
            what = f"it would have {len(text)} bytes, and cannot have more than {MOST_RECORD_BYTES}"
            raise StateError(f"the commit record cannot be written: {what}: {_ADVICE}")
        return text

    @classmethod
    def decode(cls, text: bytes, path: str) -> Record:
        """Read a record.

        Raises:
            CheckpointTooNew: a later version of this package has written it.
            CheckpointDamaged: it is no record, or not the one that was written.
        """
        try:
            content = read_json(text)
        except UnreadableJson as error:
            raise CheckpointDamaged(f"{path}: {error}", path=path) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise CheckpointDamaged(f"{path}: this is no record of a checkpoint", path=path)
        version = content.get("version")
        if type(version) is not int or version < 1:
            raise CheckpointDamaged(f"{path}: its version is none", path=path)
        if version > VERSION:
            raise CheckpointTooNew(
                f"{path}: this checkpoint has version {version} of the format, and this ferro-checkpoint reads up to "
                f"{VERSION}: update ferro-checkpoint",
                path=path,
            )
        try:
            expected = _digest({key: value for key, value in content.items() if key != "record_digest"})
        except RecursionError as error:  # Writing may go a few levels less deep than reading.
            raise CheckpointDamaged(f"{path}: its values are too deeply nested", path=path) from error
        if content.get("record_digest") != expected:
            raise CheckpointDamaged(f"{path}: the record is not the one that was written", path=path)
        fault = _fault(content)
        if fault:
            raise CheckpointDamaged(f"{path}: {fault}", path=path)
        return cls(
            step=content["step"],
            bundles={name: tuple(files) for name, files in content["bundles"].items()},
            files={
                name: FileRecord(one["bytes"], tuple(one["ends"]), tuple(one["digests"]))
                for name, one in content["files"].items()
            },
            values=content["values"],
            digest=content["digest"],
            saved_by=content["saved_by"],
        )


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(write_json(dict(content)), digest_size=16).hexdigest()


def _fault(content: Mapping[str, Any]) -> str | None:
    """Find the fault of a record that has been written as it is, by somebody; None if nothing is."""
    kinds = {"version": int, "saved_by": dict, "digest": str, "bundles": dict, "files": dict, "values": dict}
    for key, kind in kinds.items():
        if type(content.get(key)) is not kind:
            return f"its {key!r} is no {kind.__name__}"
    if "step" not in content or type(content["step"]) not in (int, type(None)):
        return "its step is no number"
    for name, one in content["files"].items():
        if not is_file_name(name):
            return f"{shown(name)} is no name of a file in it"
        if not isinstance(one, dict) or type(one.get("bytes")) is not int or not 0 <= one["bytes"] < _MOST_BYTES:
            return f"the size of file {shown(name)} is none"
        ends, digests = one.get("ends"), one.get("digests")
        if not isinstance(digests, list) or not all(isinstance(digest, str) for digest in digests):
            return f"the digests of file {shown(name)} are none"
        if not isinstance(ends, list) or not all(type(end) is int for end in ends) or len(ends) != len(digests):
            return f"the segments of file {shown(name)} are none"
        if any(end <= begin for begin, end in pairwise([0, *ends])) or [0, *ends][-1] != one["bytes"]:
            return f"the segments of file {shown(name)} do not cover it"
    listed: set[str] = set()
    for bundle, files in content["bundles"].items():
        if not BUNDLE_NAME.fullmatch(bundle):
            return f"{shown(bundle)} is no name of a bundle"
        if not isinstance(files, list) or not all(type(name) is str and name in content["files"] for name in files):
            return f"bundle {shown(bundle)} has files that the record does not list"
        before = len(listed)
        listed.update(files)
        if len(listed) != before + len(files):
            return f"bundle {shown(bundle)} has a file twice, or one of another bundle"
    return None


def is_file_name(name: str) -> bool:
    """Say whether a name is one of a file in the directory itself."""
    return name not in (".", "..", RECORD_NAME) and _FILE_NAME.fullmatch(name) is not None
