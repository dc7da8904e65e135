"""The header of a safetensors file: its length, and JSON that says where each tensor's bytes are.

    | 8 bytes   length of the JSON, little-endian
    | the JSON  {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, …}, filled up with spaces
    | the data  one tensor after another, in C order, little-endian, without holes

Source: the safetensors format, https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.layout.dtypes import ITEM_BYTES
from ferro_checkpoint.layout.json_text import UnreadableJson, read_json, write_json

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100 << 20  # as the safetensors library
ALIGNMENT = 4096  # the data begin at a page, so that ranks write whole pages
_METADATA = "__metadata__"
_MOST_DIMS = 64
_MOST_BYTES = 1 << 62


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: its name in the file, such as "F32".
        shape: of the whole tensor.
        begin: its first byte in the file, counted from the file's beginning.
        end: one more than its last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def encode_header(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Write the header of a file with these tensors (dtype names and shapes), whose data follow in this order."""
    entries: dict[str, object] = {_METADATA: dict(metadata)}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = write_json(entries)
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def header_length(first: bytes, file_bytes: int, path: str) -> int:
    """Return the bytes of a file's header with its length, which `first`, the file's first 8 bytes, say.

    Raises:
        CheckpointDamaged: the header would not fit the file, or is larger than any header may be.
    """
    length = int.from_bytes(first, "little")
    if len(first) < LENGTH_BYTES or length > min(MOST_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise CheckpointDamaged(f"{path}: a header of {length} bytes does not fit its {file_bytes} bytes", path=path)
    return LENGTH_BYTES + length


def decode_header(header: bytes, file_bytes: int, path: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read a header with its length; return the tensors, and the file's own metadata.

    Raises:
        CheckpointDamaged: it is no header of a file of so many bytes; the message names the tensor.
    """
    try:
        entries = read_json(header[LENGTH_BYTES:])
    except UnreadableJson as error:
        raise CheckpointDamaged(f"{path}: the header is no JSON: {error}", path=path) from error
    if not isinstance(entries, dict):
        raise CheckpointDamaged(f"{path}: the header is no JSON object", path=path)
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointDamaged(f"{path}: {_METADATA} is no object of texts", path=path)
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        fault = name_fault(name) or _fault(entry)
        if fault:
            raise CheckpointDamaged(f"{path}: tensor {name!r}: {fault}", path=path, tensor=name)
        begin, end = (len(header) + offset for offset in entry["data_offsets"])
        tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), begin, end)
    _check_cover(tensors, len(header), file_bytes, path)
    return tensors, metadata


def name_fault(name: str) -> str | None:
    """Say why a tensor must not have this name; None if it may."""
    if not name or "\0" in name or name == _METADATA:
        return "this is no name of a tensor"
    return None


def _fault(entry: Any) -> str | None:
    """Find the fault of a tensor's entry."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "its entry has not just dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in ITEM_BYTES:
        return f"its dtype {dtype!r} is unknown"
    if not _are_sizes(shape) or len(shape) > _MOST_DIMS:
        return f"its shape {shape!r} is none"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return f"its data_offsets {offsets!r} are none"
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        return f"{dtype} {tuple(shape)} has {nbytes} bytes, and its offsets are {offsets}"
    return None


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MOST_BYTES for value in values)


def _check_cover(tensors: Mapping[str, StoredTensor], begin: int, file_bytes: int, path: str) -> None:
    """Check that the tensors follow each other, from the header to the file's end, in some order."""
    last = "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != begin:
            what = "overlaps" if tensor.begin < begin else "leaves a hole after"
            raise CheckpointDamaged(f"{path}: tensor {name!r} {what} {last}", path=path, tensor=name)
        begin, last = tensor.end, f"tensor {name!r}"
    if begin != file_bytes:
        text = f"the tensors end at byte {begin} of {file_bytes}: the file was cut off, or something was added"
        raise CheckpointDamaged(f"{path}: {text}", path=path)
