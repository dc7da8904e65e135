"""What readers refuse, found before it is written: a checkpoint that is committed can be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ferro_checkpoint.errors import StateError
from ferro_checkpoint.layout.bundle import TensorFile, encode_index, index_name
from ferro_checkpoint.layout.dtypes import ITEM_BYTES
from ferro_checkpoint.layout.header import LENGTH_BYTES, MOST_HEADER_BYTES, name_fault, shape_fault
from ferro_checkpoint.layout.json_text import UnreadableJson, check_counts
from ferro_checkpoint.layout.record import FileRecord, Record

_ANY_DIGEST = "0" * 16
_MOST_NAME_BYTES = 255  # of a file, on all common file systems


def check_record(
    step: object,
    values: Mapping[str, Any],
    bundles: Mapping[str, Sequence[str]],
    ends: Mapping[str, Sequence[int]],
    saved_by: Mapping[str, Any],
) -> None:
    """Check that the record of a checkpoint can be read, before any digest is known.

    Args:
        step: the training's step, or None.
        values: of the state.
        bundles: the names of the bundles' files.
        ends: of the segments of each file, indexes included or not.
        saved_by: what the record will say of the program.

    Raises:
        StateError: it could not be read; the message says what is too much.
    """
    files = {
        name: FileRecord(own[-1] if own else 0, tuple(own), (_ANY_DIGEST,) * len(own)) for name, own in ends.items()
    }
    record = Record(
        step=step,  # type: ignore[arg-type]  # checked by encode
        bundles={name: tuple(own) for name, own in bundles.items()},
        files=files,
        values=values,
        digest="",
        saved_by=saved_by,
    )
    record.encode()


def check_bundle(bundle: str, files: Sequence[TensorFile]) -> None:
    """Check that the headers and the index of a bundle's files can be read.

    Raises:
        StateError: one could not be.
    """
    for file in files:
        if len(file.name.encode()) > _MOST_NAME_BYTES - len(".index.json"):
            raise StateError(f"the name of bundle {bundle[:40]!r}… is too long for a file: use a shorter key")
        for name, tensor in file.tensors.items():
            fault = name_fault(name) or shape_fault(tensor.shape, ITEM_BYTES[tensor.dtype])
            if fault is not None:
                raise StateError(f"{bundle}: array {name[:100]!r}: {fault}")
        _check_text(f"the header of {file.name}", file.header[LENGTH_BYTES:])
    if len(files) > 1:
        _check_text(index_name(bundle), encode_index(files))


def _check_text(what: str, text: bytes) -> None:
    if len(text) > MOST_HEADER_BYTES:
        text_ = f"{what} would have {len(text)} bytes, and cannot have more than {MOST_HEADER_BYTES}"
        raise StateError(f"{text_}: give the arrays shorter names, or put them under several keys of the state")
    try:
        check_counts(text)
    except UnreadableJson as error:
        raise StateError(f"{what}: {error}: put the arrays under several keys of the state") from error
