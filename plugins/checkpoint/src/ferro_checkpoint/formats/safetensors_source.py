"""Plain safetensors: one file, or a directory with an index, or several files, also with chunks of tensors.

torch.distributed.checkpoint's HuggingFaceStorageWriter may save chunks: then several files have a tensor of the same
name, and each file's metadata say in DCP_SHARDING_INFO where its chunk begins.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from numpy.typing import NDArray

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.formats.chunks import Chunk, check_disjoint, checked_chunks
from ferro_checkpoint.formats.input_file import InputFiles, read_elements, read_whole
from ferro_checkpoint.formats.source import MOST_JSON_BYTES, destination
from ferro_checkpoint.layout.bundle import SUFFIX, Described
from ferro_checkpoint.layout.header import LENGTH_BYTES, StoredTensor, decode_header, header_length
from ferro_checkpoint.layout.json_text import UnreadableJson, read_json, shown
from ferro_checkpoint.layout.record import is_file_name

INDEX_SUFFIX = f"{SUFFIX}.index.json"
_SHARDING_INFO = "DCP_SHARDING_INFO"


class SafetensorsSource:
    """Tensors of safetensors files. Values are the files' own metadata (texts), where all that have a key agree."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        index = _index_of(self.path)
        directory = self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
        expected = None if index is None else read_index(index)
        if expected is not None:
            names: Iterable[str] = sorted(set(expected.values()))
        elif directory == self.path:
            names = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIX))
        else:
            names = [os.path.basename(self.path)]
        self._files = InputFiles(directory)
        self.unreadable: Mapping[str, str] = {}
        self.values: dict[str, Any] = {}
        try:
            self._read_headers(names, expected)
        except BaseException:
            self.close()
            raise

    def _read_headers(self, names: Iterable[str], expected: Mapping[str, str] | None) -> None:
        found: dict[str, list[tuple[str, StoredTensor, Any]]] = {}
        differing = set()
        for file in names:
            tensors, metadata = self._header(file)
            offsets = _saved_offsets(metadata, os.path.join(self._files.directory, file))
            for name, stored in tensors.items():
                found.setdefault(name, []).append((file, stored, offsets.get(name)))
            for key, value in metadata.items():
                if key != _SHARDING_INFO and self.values.setdefault(key, value) != value:
                    differing.add(key)
        for key in differing:
            del self.values[key]
        if expected is not None:
            _check_index(self.path, expected, {name: {place[0] for place in places} for name, places in found.items()})
        self.tensors: dict[str, Described] = {}
        self._chunks: dict[str, list[Chunk[tuple[str, int]]]] = {}
        for name, places in found.items():
            self._add(name, places)

    def _header(self, file: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
        opened = self._files.open(file)
        first = opened.read(0, min(LENGTH_BYTES, opened.nbytes))
        length = header_length(first, opened.nbytes, opened.path)
        return decode_header(opened.read(0, length), opened.nbytes, opened.path)

    def _add(self, name: str, places: list[tuple[str, StoredTensor, Any]]) -> None:
        """Take a tensor that is in one file, or as chunks in several."""
        dtype = places[0][1].dtype
        chunks = []
        for file, stored, offsets in places:
            fault = None
            if len(places) > 1 and offsets is None:
                fault = f"{places[0][0]} has it too, and nothing says which part each of them has"
            elif stored.dtype != dtype:
                fault = f"it is {stored.dtype} there, and {dtype} in {places[0][0]}"
            elif offsets is not None and not _is_position(offsets, len(stored.shape)):
                fault = f"its saved_offsets {shown(offsets)} are no position"
            elif len(stored.shape) != len(places[0][1].shape):
                fault = f"it has {len(stored.shape)} dimensions there, and {len(places[0][1].shape)} in {places[0][0]}"
            if fault is not None:
                path = os.path.join(self._files.directory, file)
                raise CheckpointDamaged(f"{path}: tensor {name!r}: {fault}", path=path, tensor=name)
            chunks.append(Chunk(offsets or (0,) * len(stored.shape), stored.shape, (file, stored.begin)))
        ends = ([start + size for start, size in zip(one.start, one.extent, strict=True)] for one in chunks)
        shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
        self._chunks[name] = checked_chunks(chunks, shape, self.path, name)
        self.tensors[name] = (dtype, shape)

    def read(self, name: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Read one tensor; see `TensorSource.read`."""
        out = destination(self, name, out)
        check_disjoint(self._chunks[name], self.path, name)
        for chunk in self._chunks[name]:
            file, begin = chunk.where
            read_elements(self._files.open(file), begin, chunk.box_of(out))
        return out

    def file_of(self, name: str) -> str | None:
        """Return the name of the file that a tensor is in; None if several have chunks of it, or it has no element."""
        chunks = self._chunks[name]
        return chunks[0].where[0] if len(chunks) == 1 else None

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def read_index(path: str) -> dict[str, str]:
    """Read an index: the file's name by tensor.

    Raises:
        CheckpointDamaged: it is no index, or names a file outside its own directory.
    """
    try:
        content = read_json(read_whole(path, MOST_JSON_BYTES))
    except UnreadableJson as error:
        raise CheckpointDamaged(f"{path}: {error}", path=path) from error
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict):
        raise CheckpointDamaged(f"{path}: it has no object 'weight_map'", path=path)
    for name, file in where.items():
        if not isinstance(file, str) or not is_file_name(file) or not file.endswith(SUFFIX):
            text = f"{shown(file)} is no name of a {SUFFIX} file in the same directory"
            raise CheckpointDamaged(f"{path}: tensor {name!r}: {text}", path=path, tensor=name)
    return where


def _index_of(path: str) -> str | None:
    """Return the index to go by; None if there is none."""
    if path.endswith(INDEX_SUFFIX):
        return path
    if not os.path.isdir(path):
        return None
    found = sorted(name for name in os.listdir(path) if name.endswith(INDEX_SUFFIX))
    if len(found) > 1:
        text = f"{path} has the indices {', '.join(found)}: give the path of the one to read"
        raise CheckpointError(text, path=path)
    return os.path.join(path, found[0]) if found else None


def _check_index(path: str, expected: Mapping[str, str], found: Mapping[str, set[str]]) -> None:
    for name, file in expected.items():
        if file not in found.get(name, ()):
            text = f"the index says that tensor {name!r} is in {file}, which does not have it"
            raise CheckpointDamaged(f"{path}: {text}", path=path, tensor=name)
    for name, files in found.items():
        if name not in expected:
            text = f"{min(files)} has tensor {name!r}, which is not in the index"
            raise CheckpointDamaged(f"{path}: {text}", path=path, tensor=name)


def _saved_offsets(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    """Read where the chunks in a file begin, if its metadata say so."""
    if _SHARDING_INFO not in metadata:
        return {}
    try:
        content = read_json(metadata[_SHARDING_INFO].encode())
    except UnreadableJson as error:
        raise CheckpointDamaged(f"{path}: {_SHARDING_INFO}: {error}", path=path) from error
    if not isinstance(content, dict) or not all(isinstance(one, dict) for one in content.values()):
        raise CheckpointDamaged(f"{path}: {_SHARDING_INFO} is no object of objects", path=path)
    return {name: one.get("saved_offsets") for name, one in content.items()}


def _is_position(offsets: Any, dims: int) -> bool:
    return (
        isinstance(offsets, list)
        and len(offsets) == dims
        and all(type(offset) is int and 0 <= offset < 1 << 62 for offset in offsets)
    )
