"""The header of a safetensors file: its length, and JSON that says where each tensor's bytes are.

    | 8 bytes   length of the JSON, little-endian
    | the JSON  {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, …}, filled up with spaces
    | the data  one tensor after another, in C order, little-endian, without holes

Source: the safetensors format, https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.layout.dtypes import ITEM_BYTES
from ferro_checkpoint.layout.json_text import UnreadableJson, read_json, shown, write_json

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100 << 20  # as the safetensors library
ALIGNMENT = 4096  # the data begin at a page, so that ranks write whole pages
_METADATA = "__metadata__"
_quoted = json.encoder.encode_basestring  # writes a text as JSON
MOST_DIMS = 64
_TEXT = r'"[^"\\\x00-\x1f]*"'
_USUAL_METADATA = re.compile(rf'\{{"{_METADATA}":(\{{(?:{_TEXT}:{_TEXT},?)*+\}})')
_USUAL_ENTRY = re.compile(
    r',"([^"\\\x00-\x1f]+)":\{"dtype":"([A-Z0-9_]+)","shape":\[([0-9,]*)\],'
    r'"data_offsets":\[(0|[1-9][0-9]{0,17}),(0|[1-9][0-9]{0,17})\]\}'
)
_USUAL_PUNCTUATION = len(',"":{"dtype":"","shape":[],"data_offsets":[,]}')
_MOST_BYTES = 1 << 62


class StoredTensor(NamedTuple):
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


Decoded: TypeAlias = tuple[dict[str, StoredTensor], dict[str, str]]
"""The tensors, and the file's own metadata."""


def encode_header(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Write the header of a file with these tensors (dtype names and shapes), whose data follow in this order."""
    # JSON is written by hand, since there may be hundreds of thousands of tensors.
    entries = [f'"{_METADATA}":{write_json(dict(metadata)).decode()}']
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + math.prod(shape) * ITEM_BYTES[dtype]
        sizes = ",".join(map(str, shape))
        entries.append(f'{_quoted(name)}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{begin},{end}]}}')
        begin = end
    text = f"{{{','.join(entries)}}}".encode()
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


def decode_header(header: bytes, file_bytes: int, path: str) -> Decoded:
    """Read a header with its length; return the tensors, and the file's own metadata.

    Raises:
        CheckpointDamaged: it is no header of a file of so many bytes; the message names the tensor.
    """
    found = _decode_usual(header) or _decode_json(header, path)
    _check_cover(found[0], len(header), file_bytes, path)
    return found


def _decode_usual(header: bytes) -> Decoded | None:
    """Read a header as this package and the safetensors library write it; None if it is another one, or has a fault.

    It reads nothing that `_decode_json` would read in another way, and takes a third of its time: opening a
    checkpoint of 10,000 tensors takes hardly longer than this.
    """
    try:
        text = header[LENGTH_BYTES:].decode("utf-8").rstrip(" ")
        start = _USUAL_METADATA.match(text)
        metadata = _metadata(read_json(start[1].encode())) if start else {}
    except (UnicodeDecodeError, UnreadableJson):
        return None
    length, begin = (start.end() if start else 0), len(header)
    if not start and text.startswith("{"):
        text = "," + text[1:]  # so that the first entry begins as the others do
    entries = _USUAL_ENTRY.findall(text, length)
    sizes: dict[tuple[str, str], tuple[tuple[int, ...], int]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, dtype, numbers, first, last in entries:
        size = sizes.get((dtype, numbers)) or _size(dtype, numbers)
        if size is None or int(last) - int(first) != size[1]:
            return None
        sizes[dtype, numbers] = size
        tensors[name] = StoredTensor(dtype, size[0], begin + int(first), begin + int(last))
        length += _USUAL_PUNCTUATION + len(name) + len(dtype) + len(numbers) + len(first) + len(last)
    # The entries are parts of the text that do not overlap: where their lengths add up, they are all of it.
    usual = length + 1 == len(text) and text.endswith("}") and len(tensors) == len(entries)
    return (tensors, metadata) if usual and metadata is not None and _METADATA not in tensors else None


def _size(dtype: str, numbers: str) -> tuple[tuple[int, ...], int] | None:
    """Read a shape such as "2,3", and count the bytes; None if that cannot be."""
    try:
        shape = tuple(map(int, numbers.split(","))) if numbers else ()
    except ValueError:
        return None
    usual = ",".join(map(str, shape)) == numbers and dtype in ITEM_BYTES and not shape_fault(shape, ITEM_BYTES[dtype])
    return (shape, math.prod(shape) * ITEM_BYTES[dtype]) if usual else None


def _decode_json(header: bytes, path: str) -> Decoded:
    """Read any header."""
    try:
        entries = read_json(header[LENGTH_BYTES:])
    except UnreadableJson as error:
        raise CheckpointDamaged(f"{path}: the header is no JSON: {error}", path=path) from error
    if not isinstance(entries, dict):
        raise CheckpointDamaged(f"{path}: the header is no JSON object", path=path)
    metadata = _metadata(entries.pop(_METADATA, {}))
    if metadata is None:
        raise CheckpointDamaged(f"{path}: {_METADATA} is no object of texts", path=path)
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        fault = name_fault(name) or _fault(entry)
        if fault:
            raise CheckpointDamaged(f"{path}: tensor {shown(name)}: {fault}", path=path, tensor=name)
        begin, end = (len(header) + offset for offset in entry["data_offsets"])
        tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), begin, end)
    return tensors, metadata


def _metadata(value: Any) -> dict[str, str] | None:
    texts = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    return value if texts else None


def name_fault(name: str) -> str | None:
    """Say why a tensor must not have this name; None if it may."""
    if not name or "\0" in name or name == _METADATA:
        return "this is no name of a tensor"
    return None


def shape_fault(shape: Sequence[int], itemsize: int) -> str | None:
    """Say why no array has this shape; None if one can. The sizes beside a 0 count as well: NumPy multiplies them."""
    if len(shape) > MOST_DIMS:
        return f"it has {len(shape)} dimensions, and arrays have at most {MOST_DIMS}"
    if math.prod(filter(None, shape)) * itemsize >= _MOST_BYTES:
        return "it is too large for any memory"
    return None


def _fault(entry: Any) -> str | None:
    """Find the fault of a tensor's entry."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "its entry has not just dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"its dtype {shown(dtype)} is unknown"
    if not _are_sizes(shape) or shape_fault(shape, ITEM_BYTES[dtype]):
        return f"its shape {shown(shape)} is none"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return f"its data_offsets {shown(offsets)} are none"
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        return f"{dtype} {tuple(shape)} has {nbytes} bytes, and its offsets are {offsets}"
    return None


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MOST_BYTES for value in values)


def _check_cover(tensors: Mapping[str, StoredTensor], begin: int, file_bytes: int, path: str) -> None:
    """Check that the tensors follow each other, from the header to the file's end, in some order."""
    last = None
    for begins, end, name in sorted((tensor.begin, tensor.end, name) for name, tensor in tensors.items()):
        if begins != begin:
            what = "overlaps" if begins < begin else "leaves a hole after"
            before = "the header" if last is None else f"tensor {shown(last)}"
            raise CheckpointDamaged(f"{path}: tensor {shown(name)} {what} {before}", path=path, tensor=name)
        begin, last = end, name
    if begin != file_bytes:
        text = f"the tensors end at byte {begin} of {file_bytes}: the file was cut off, or something was added"
        raise CheckpointDamaged(f"{path}: {text}", path=path)
