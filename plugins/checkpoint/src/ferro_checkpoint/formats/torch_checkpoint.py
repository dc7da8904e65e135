"""A directory of torch.distributed.checkpoint, read without torch and without executing anything of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.formats.chunks import check_disjoint
from ferro_checkpoint.formats.input_file import InputFiles, read_whole
from ferro_checkpoint.formats.pickle_names import Built
from ferro_checkpoint.formats.pickle_reader import MOST_PICKLE_BYTES
from ferro_checkpoint.formats.source import destination
from ferro_checkpoint.formats.torch_archive import TorchArchive
from ferro_checkpoint.formats.torch_metadata import KeyPath, decode_metadata, rank_metadata_names
from ferro_checkpoint.layout.bundle import Described

METADATA_NAME = ".metadata"
_MOST_DEPTH = 100
_MOST_ITEMS = 1_000_000


class TorchCheckpoint:
    """Tensors and values of a checkpoint of torch.distributed.checkpoint, by the names that torch gave them.

    Attributes:
        path: as it was given: the directory, or a file of metadata in it.
        tensors: dtype and shape by name.
        paths: the keys of the nested state that lead to each entry, tensors and others.
    """

    path: str
    tensors: Mapping[str, Described]
    paths: Mapping[str, KeyPath]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        is_directory = os.path.isdir(self.path)
        directory = self.path if is_directory else os.path.dirname(self.path)
        metadata = os.path.join(self.path, METADATA_NAME) if is_directory else self.path
        if is_directory and not os.path.exists(metadata) and (names := rank_metadata_names(self.path)):
            text = f"{self.path}: every rank saved for itself: give the path of one rank's metadata, such as {names[0]}"
            raise CheckpointError(text, path=self.path)
        self._files = InputFiles(directory)
        lengths: dict[str, int] = {}

        def file_bytes(file: str) -> int:
            if file not in lengths:
                lengths[file] = self._files.open(file).nbytes
            return lengths[file]

        try:
            found = decode_metadata(read_whole(metadata, MOST_PICKLE_BYTES), metadata, file_bytes)
        except BaseException:
            self.close()
            raise
        self.tensors, self.paths = found.tensors, found.paths
        self._chunks, self._objects = found.chunks, found.objects

    @property
    def values(self) -> Mapping[str, Any]:
        """Values by name, as JSON: tuples are lists, and keys that are integers are texts."""
        return self._read_objects[0]

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Objects that are no JSON values, or of classes that are not read: the reason by name."""
        return self._read_objects[1]

    def read(self, name: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Read one tensor; see `TensorSource.read`."""
        out = destination(self, name, out)
        chunks = self._chunks[name]
        check_disjoint(chunks, self.path, name)
        for chunk in chunks:
            place = chunk.where
            try:
                archive = TorchArchive(self._files.open(place.file), place.begin, place.end)
                archive.read_tensor(chunk.box_of(out), self.tensors[name][0])
            except CheckpointDamaged as error:
                raise CheckpointDamaged(f"tensor {name!r}: {error}", path=error.path, tensor=name) from error
        return out

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    @cached_property
    def _read_objects(self) -> tuple[dict[str, Any], dict[str, str]]:
        values: dict[str, Any] = {}
        unreadable: dict[str, str] = {}
        for name, place in self._objects.items():
            try:
                value = TorchArchive(self._files.open(place.file), place.begin, place.end).value()
                values[name] = _Converter().convert(value, 0)
            except (CheckpointDamaged, _NoJson) as error:
                unreadable[name] = str(error)
        return values, unreadable


class _NoJson(Exception):
    pass


class _Converter:
    """Converts one object; counts what it makes, because a pickle may refer to one list a million times."""

    def __init__(self) -> None:
        self._items = 0

    def convert(self, value: Any, depth: int) -> Any:
        """Return the value as JSON."""
        self._items += 1
        if depth > _MOST_DEPTH or self._items > _MOST_ITEMS:
            raise _NoJson(f"it is nested more than {_MOST_DEPTH} deep, or has more than {_MOST_ITEMS} items")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, (list, tuple)):
            return [self.convert(item, depth + 1) for item in value]
        if type(value) is dict:
            converted = {self._key(key): self.convert(item, depth + 1) for key, item in value.items()}
            if len(converted) != len(value):
                raise _NoJson("two keys of a dict have the same text")
            return converted
        raise _NoJson(f"it holds {f'a {value.kind}' if isinstance(value, Built) else type(value).__name__}")

    def _key(self, key: Any) -> str:
        if type(key) not in (str, int):
            raise _NoJson(f"a key of a dict is {type(key).__name__}")
        return str(key)
