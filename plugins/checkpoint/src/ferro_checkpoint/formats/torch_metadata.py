"""`.metadata` of torch.distributed.checkpoint: which tensors there are, and in which file's range each chunk is.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py (2.13.0).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.formats.chunks import Chunk, checked_chunks
from ferro_checkpoint.formats.pickle_names import Built
from ferro_checkpoint.formats.pickle_reader import read_pickle
from ferro_checkpoint.formats.torch_names import METADATA_NAMES, TorchDtype, TorchSize, item_bytes
from ferro_checkpoint.layout.bundle import Described
from ferro_checkpoint.layout.json_text import shown
from ferro_checkpoint.layout.record import is_file_name

KeyPath: TypeAlias = "tuple[str | int, ...]"
"""Where an entry is in the nested state that was saved."""


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes of a file in the checkpoint's directory."""

    file: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TorchMetadata:
    """The contents of a `.metadata`.

    Attributes:
        tensors: dtype and shape by name.
        chunks: of each tensor.
        objects: where the archives of other objects are.
        paths: where each entry was in the nested state.
    """

    tensors: Mapping[str, Described]
    chunks: Mapping[str, list[Chunk[FileRange]]]
    objects: Mapping[str, FileRange]
    paths: Mapping[str, KeyPath]


def decode_metadata(data: bytes, path: str, file_bytes: Callable[[str], int]) -> TorchMetadata:
    """Read a `.metadata`.

    Args:
        data: its content.
        path: for messages.
        file_bytes: returns the length of a file of the directory, or raises CheckpointError.

    Raises:
        CheckpointDamaged: it is none, or does not fit the files.
        CheckpointError: it uses what is not read, such as compression by an extension.
    """
    root = read_pickle(data, METADATA_NAMES, path)
    return _Decoder(path, file_bytes).decode(root)


class _Decoder:
    def __init__(self, path: str, file_bytes: Callable[[str], int]) -> None:
        self._path = path
        self._file_bytes = file_bytes
        self._ranges: dict[tuple[str, tuple[int, ...] | None], FileRange] = {}

    def decode(self, root: Any) -> TorchMetadata:
        state = self._state(root, "Metadata")
        entries = self._dict(state, "state_dict_metadata")
        for index, info in self._dict(state, "storage_data").items():
            self._add_range(index, info)
        self._check_overlaps()
        tensors: dict[str, Described] = {}
        chunks: dict[str, list[Chunk[FileRange]]] = {}
        objects: dict[str, FileRange] = {}
        for name, entry in entries.items():
            if type(name) is not str or not name or "\0" in name:
                self._refuse(f"{shown(name)} is no name of an entry")
            if isinstance(entry, Built) and entry.kind == "BytesStorageMetadata":
                objects[name] = self._range(name, None)
            else:
                tensors[name], chunks[name] = self._tensor(name, self._state(entry, "TensorStorageMetadata"))
        return TorchMetadata(tensors, chunks, objects, self._paths(state.get("planner_data"), entries))

    def _tensor(self, name: str, state: Mapping[str, Any]) -> tuple[Described, list[Chunk[FileRange]]]:
        properties, shape, stored = (state.get(key) for key in ("properties", "size", "chunks"))
        if not isinstance(properties, Built) or properties.kind != "TensorProperties":
            self._refuse(f"tensor {name!r} has no properties")
        known = properties.state
        dtype = known[0] if type(known) is tuple and known else known.get("dtype") if type(known) is dict else None
        if type(dtype) is not TorchDtype or type(shape) is not TorchSize or type(stored) is not list:
            self._refuse(f"tensor {name!r} has no dtype that is read, no size or no chunks")
        chunks = []
        for one in stored:
            chunk = self._state(one, "ChunkStorageMetadata")
            start, extent = chunk.get("offsets"), chunk.get("sizes")
            if type(start) is not TorchSize or type(extent) is not TorchSize:
                self._refuse(f"a chunk of tensor {name!r} has no offsets or no sizes")
            place = self._range(name, start)
            if math.prod(extent) * item_bytes(dtype) > place.end - place.begin:
                self._refuse(f"a chunk of tensor {name!r} has shape {tuple(extent)}, and too few bytes for it")
            chunks.append(Chunk(start, extent, place))
        return (str(dtype), tuple(shape)), checked_chunks(chunks, tuple(shape), self._path, name)

    def _add_range(self, index: Any, info: Any) -> None:
        key = self._state(index, "MetadataIndex")
        place = self._state(info, "_StorageInfo")
        name, start = key.get("fqn"), key.get("offset")
        file, begin, length = (place.get(one) for one in ("relative_path", "offset", "length"))
        if type(name) is not str or not (start is None or type(start) is TorchSize):
            self._refuse("an index of its storage_data is none")
        if type(file) is not str or not is_file_name(file):
            self._refuse(f"entry {shown(name)} is in {shown(file)}, which is no name of a file in the same directory")
        if place.get("transform_descriptors"):
            text = f"entry {name!r} is stored with the extensions {shown(place['transform_descriptors'])}"
            raise CheckpointError(f"{self._path}: {text}, which are not read: save it without them", path=self._path)
        if type(begin) is not int or type(length) is not int or begin < 0 or length < 0:
            self._refuse(f"entry {name!r} has no range in {file}")
        nbytes = self._file_bytes(file)
        if begin + length > nbytes:
            self._refuse(f"entry {name!r} is at bytes {begin} to {begin + length} of {file}, which has {nbytes}")
        self._ranges[name, None if start is None else tuple(start)] = FileRange(file, begin, begin + length)

    def _range(self, name: str, start: TorchSize | None) -> FileRange:
        found = self._ranges.get((name, None if start is None else tuple(start)))
        if found is None:
            at = "" if start is None else f" at {tuple(start)}"
            self._refuse(f"nothing says where the data of {name!r}{at} are")
        return found

    def _check_overlaps(self) -> None:
        """Check that no byte belongs to two entries."""
        last = FileRange("", 0, 0)
        for one in sorted(set(self._ranges.values()), key=lambda one: (one.file, one.begin, one.end)):
            if one.file == last.file and one.begin < last.end:
                self._refuse(f"two entries overlap in {one.file} at byte {one.begin}")
            last = one

    def _paths(self, planner_data: Any, entries: Mapping[str, Any]) -> dict[str, KeyPath]:
        """Return the keys that led to each entry in the nested state; a user's own planner may not tell them."""
        known = planner_data if type(planner_data) is dict else {}
        paths: dict[str, KeyPath] = {}
        for name in entries:
            path = known.get(name)
            if type(path) is tuple and path and all(type(key) in (str, int) for key in path):
                paths[name] = path
            else:
                paths[name] = (name,)
        return paths

    def _state(self, value: Any, kind: str) -> dict[str, Any]:
        if not isinstance(value, Built) or value.kind != kind or type(value.state) is not dict:
            self._refuse(f"a {kind} is expected, and something else is there")
        return value.state

    def _dict(self, state: Mapping[str, Any], key: str) -> dict[Any, Any]:
        value = state.get(key)
        if type(value) is not dict:
            self._refuse(f"its {key} is no dict")
        return value

    def _refuse(self, fault: str) -> NoReturn:
        raise CheckpointDamaged(f"{self._path}: {fault}", path=self._path)


def rank_metadata_names(directory: str) -> list[str]:
    """Return the metadata files of a directory that ranks saved without agreeing on one."""
    return sorted(name for name in os.listdir(directory) if name.startswith("__") and name.endswith(".metadata"))
