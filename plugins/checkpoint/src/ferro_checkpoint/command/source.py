"""What the commands read: tensors and values of a checkpoint, or of another format, a MiB at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ferro.errors import UsageError
from ferro_checkpoint.errors import CheckpointIncomplete
from ferro_checkpoint.formats import Format, TensorSource, open_foreign
from ferro_checkpoint.formats.rank_files import RankFilesSource
from ferro_checkpoint.formats.safetensors_source import SafetensorsSource
from ferro_checkpoint.formats.source import numpy_dtype
from ferro_checkpoint.formats.torch_checkpoint import TorchCheckpoint
from ferro_checkpoint.layout.dtypes import ITEM_BYTES
from ferro_checkpoint.layout.record import RECORD_NAME, Record
from ferro_checkpoint.opened.checkpoint import OpenedCheckpoint
from ferro_checkpoint.opened.place import COMPLEX128
from ferro_checkpoint.storage.opening import split_path
from ferro_checkpoint.storage.saver import TOKEN_NAME

PIECE_BYTES = 1 << 20
_KINDS = (
    (SafetensorsSource, "plain safetensors"),
    (TorchCheckpoint, "torch.distributed.checkpoint"),
    (RankFilesSource, "ferrotorch-distributed"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a source.

    Attributes:
        dtype: its name in safetensors files, such as "F32", or NumPy's where these have none, such as "complex128".
        shape: of the array.
        nbytes: of its elements.
        file: the name of the file that it is in; None if there are several, or it is not known.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str | None


class NamedTensors(Protocol):
    """Tensors by name, and values beside them.

    Attributes:
        path: for messages.
        kind: what it is.
        tensors: by name; of a checkpoint by full name.
        values: as JSON, by path in the state.
        record: of a checkpoint; None for other formats.
    """

    path: str
    kind: str
    tensors: Mapping[str, TensorInfo]
    values: Mapping[str, Any]
    record: Record | None

    def pieces(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """Read a tensor's bytes, `PIECE_BYTES` at a time; a piece is of use until the next one is read."""

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return a tensor's dtype. Raises CheckpointError if it needs ml_dtypes, which is not installed."""

    def close(self) -> None: ...  # noqa: D102


class CheckpointSource:
    """A checkpoint; the digests of all bytes that are read are checked."""

    kind = "checkpoint"

    def __init__(self, opened: OpenedCheckpoint) -> None:
        self.path = opened.path
        self.record: Record | None = opened.record
        self.values: Mapping[str, Any] = {
            name: value for name, value in opened.record.values.items() if name != COMPLEX128
        }
        self.opened = opened
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(
                "complex128" if it.complex128 else it.dtype, it.array_shape, it.end - it.begin, file=it.file
            )
            for name, it in opened.tensors.items()
        }

    def pieces(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """See `NamedTensors`."""
        place = self.opened.tensors[name]
        memory = np.empty(min(PIECE_BYTES, place.end - place.begin), np.uint8)
        for begin in range(place.begin, place.end, PIECE_BYTES):
            piece = memory[: place.end - begin]
            self.opened.read_bytes(place.file, begin, piece.data)
            yield piece

    def dtype(self, name: str) -> np.dtype[Any]:
        """See `NamedTensors`."""
        return self.opened.tensors[name].array_dtype(name, self.path)

    def close(self) -> None:
        """See `NamedTensors`."""
        self.opened.close()


class ForeignSource:
    """Tensors that another program has written; of these each is read as a whole."""

    record: Record | None = None

    def __init__(self, source: TensorSource) -> None:
        self.path = source.path
        self.values: Mapping[str, Any] = source.values
        self.source = source
        self.kind = next(text for kind, text in _KINDS if isinstance(source, kind))
        file_of = source.file_of if isinstance(source, SafetensorsSource) else lambda name: None
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(dtype, shape, math.prod(shape) * self._item_bytes(name, dtype), file_of(name))
            for name, (dtype, shape) in source.tensors.items()
        }

    def pieces(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """See `NamedTensors`."""
        content = self.source.read(name).reshape(-1).view(np.uint8)
        for begin in range(0, len(content), PIECE_BYTES):
            yield content[begin : begin + PIECE_BYTES]

    def dtype(self, name: str) -> np.dtype[Any]:
        """See `NamedTensors`."""
        return numpy_dtype(self.tensors[name].dtype, self.path, name)

    def close(self) -> None:
        """See `NamedTensors`."""
        self.source.close()

    def _item_bytes(self, name: str, dtype: str) -> int:
        return ITEM_BYTES.get(dtype) or numpy_dtype(dtype, self.path, name).itemsize


class Selection:
    """Some tensors of a source, under other names, without values."""

    def __init__(self, source: NamedTensors, names: Mapping[str, str]) -> None:
        """Take the tensors whose names in the source are `names[new name]`."""
        self.path = source.path
        self.kind = source.kind
        self.record = source.record
        self.values: Mapping[str, Any] = {}
        self.tensors: Mapping[str, TensorInfo] = {new: source.tensors[old] for new, old in names.items()}
        self._source = source
        self._names = names

    def pieces(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """See `NamedTensors`."""
        return self._source.pieces(self._names[name])

    def dtype(self, name: str) -> np.dtype[Any]:
        """See `NamedTensors`."""
        return self._source.dtype(self._names[name])

    def close(self) -> None:
        """See `NamedTensors`."""
        self._source.close()


@contextmanager
def opened_source(path: str, format: Format | None = None) -> Iterator[NamedTensors]:  # noqa: A002
    """Open a checkpoint, or what another program has written.

    Args:
        path: of a checkpoint, or of a file or directory of another format.
        format: the other format; None: found out.

    Raises:
        CheckpointError: it is none of them, damaged, or cannot be read.
    """
    with closing(_open(path, format)) as source:
        yield source


def _open(path: str, format: Format | None) -> NamedTensors:  # noqa: A002
    if format is not None:
        return ForeignSource(open_foreign(path, format))
    storage, name = split_path(path)
    try:
        return CheckpointSource(OpenedCheckpoint.open(storage, name))
    except CheckpointIncomplete:
        files = storage.files(name)
        checkpoints = any(os.path.isfile(os.path.join(path, file, RECORD_NAME)) for file in files)
        if not os.path.exists(path) or TOKEN_NAME in files or checkpoints:
            raise  # There is nothing, or a save that has not ended, or several checkpoints, of which it names some.
    return ForeignSource(open_foreign(path))


def bundle_of(source: NamedTensors, bundle: str) -> NamedTensors:
    """Take one bundle of a checkpoint, under the names in its files; another format's tensors as they are.

    Raises:
        UsageError: the checkpoint has no such bundle.
    """
    if source.record is None:
        return source
    if bundle not in source.record.bundles:
        raise UsageError(f"--bundle {bundle}: {source.path} has the bundles {', '.join(source.record.bundles)}")
    prefix = f"{bundle}."
    names = {name.removeprefix(prefix): name for name in source.tensors if name.startswith(prefix)}
    return Selection(source, names)
