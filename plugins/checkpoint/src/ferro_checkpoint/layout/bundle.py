"""A bundle: the tensors of one part of the state, such as "model", and the files that they are in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ferro_checkpoint.layout.dtypes import ITEM_BYTES
from ferro_checkpoint.layout.header import MOST_HEADER_BYTES, StoredTensor, encode_header
from ferro_checkpoint.layout.json_text import write_json

Described: TypeAlias = "tuple[str, tuple[int, ...]]"
"""A tensor's dtype, by its name in files, and its shape."""

FILE_BYTES = 4 << 30  # of one file's data; a larger tensor has a file of its own
SUFFIX = ".safetensors"
_HEADER_BYTES = MOST_HEADER_BYTES // 2
_METADATA = {"format": "pt"}  # what loaders of this format ask for; the arrays are nobody's in particular


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A file of tensors.

    Attributes:
        name: within the checkpoint's directory.
        header: its first bytes.
        tensors: by name.
        nbytes: its size.
    """

    name: str
    header: bytes
    tensors: Mapping[str, StoredTensor]
    nbytes: int


def layout_bundle(bundle: str, tensors: Mapping[str, Described], file_bytes: int = FILE_BYTES) -> list[TensorFile]:
    """Choose the files of a bundle's tensors; every rank that is given the same tensors chooses the same.

    Args:
        bundle: its name.
        tensors: by name.
        file_bytes: how many bytes of data a file may have, unless it has one tensor alone.
    """
    groups: list[list[str]] = []
    filled = header_bytes = 0
    # The tensors of larger elements come first, so that each begins at a multiple of its element's bytes.
    by_size: dict[int, list[str]] = {}
    for name in sorted(tensors):
        by_size.setdefault(ITEM_BYTES[tensors[name][0]], []).append(name)
    for itemsize in sorted(by_size, reverse=True):
        for name in by_size[itemsize]:
            nbytes = math.prod(tensors[name][1]) * itemsize
            if not groups or filled + nbytes > file_bytes or header_bytes > _HEADER_BYTES:
                groups.append([])
                filled = header_bytes = 0
            groups[-1].append(name)
            filled += nbytes
            header_bytes += 6 * len(name) + 100  # at most, but for arrays of very many dimensions
    if len(groups) <= 1:
        names = [f"{bundle}{SUFFIX}"] * len(groups)
    else:
        names = [f"{bundle}-{number:05}-of-{len(groups):05}{SUFFIX}" for number in range(1, len(groups) + 1)]
    return [_file(name, group, tensors) for name, group in zip(names, groups, strict=True)]


def index_name(bundle: str) -> str:
    """Return the name of a bundle's index, which says in which file each tensor is."""
    return f"{bundle}{SUFFIX}.index.json"


def encode_index(files: Sequence[TensorFile]) -> bytes:
    """Write the index of a bundle of several files, as loaders of sharded safetensors read it."""
    total = sum(tensor.end - tensor.begin for file in files for tensor in file.tensors.values())
    where = {name: file.name for file in files for name in file.tensors}
    return write_json({"metadata": {"total_size": total}, "weight_map": where})


def _file(name: str, group: Iterable[str], tensors: Mapping[str, Described]) -> TensorFile:
    own = {tensor: tensors[tensor] for tensor in group}
    header = encode_header(own, _METADATA)
    stored, begin = {}, len(header)
    for tensor, (dtype, shape) in own.items():
        end = begin + math.prod(shape) * ITEM_BYTES[dtype]
        stored[tensor] = StoredTensor(dtype, shape, begin, end)
        begin = end
    return TensorFile(name, header, stored, begin)
