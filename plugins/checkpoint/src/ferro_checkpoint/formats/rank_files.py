"""The layout of the Rust crate ferrotorch-distributed: rank_0.safetensors and so on, and a metadata.json.

metadata.json says for each sharded tensor its full shape and the dimension that is cut; the pieces follow each other
by rank. The sizes of the pieces are those of the files' own tensors: the crate's `shard_sizes` need not be right, for
nothing in it checks them. A tensor that metadata.json does not list is whole: it must be the same on all ranks.
If it is not, each rank's is a tensor of its own, "NAME@rank_R".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NoReturn

from numpy.typing import NDArray

from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.formats.chunks import Chunk
from ferro_checkpoint.formats.input_file import BUFFER_BYTES, InputFiles, read_elements, read_whole
from ferro_checkpoint.formats.source import MOST_JSON_BYTES, destination
from ferro_checkpoint.layout.bundle import SUFFIX, Described
from ferro_checkpoint.layout.header import LENGTH_BYTES, StoredTensor, decode_header, header_length
from ferro_checkpoint.layout.json_text import UnreadableJson, read_json

METADATA_NAME = "metadata.json"
_MOST_RANKS = 1 << 20
_Place = tuple[str, StoredTensor]


class RankFilesSource:
    """Tensors of the crate's checkpoint, whole. There are no values in it.

    Opening it reads the tensors that metadata.json does not list, because ranks may differ in them.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.values: Mapping[str, Any] = {}
        self.unreadable: Mapping[str, str] = {}
        self.tensors: dict[str, Described] = {}
        self._chunks: dict[str, list[Chunk[_Place]]] = {}
        self._files = InputFiles(self.path)
        try:
            ranks, specs = self._metadata()
            self._read_headers(ranks, specs)
        except BaseException:
            self.close()
            raise

    def _metadata(self) -> tuple[int, Mapping[str, tuple[tuple[int, ...], int]]]:
        """Return the number of ranks, and full shape and cut dimension by name."""
        path = os.path.join(self.path, METADATA_NAME)
        try:
            content = read_json(read_whole(path, MOST_JSON_BYTES))
        except UnreadableJson as error:
            raise CheckpointDamaged(f"{path}: {error}", path=path) from error
        ranks = content.get("num_ranks") if isinstance(content, dict) else None
        specs = content.get("tensor_specs") if isinstance(content, dict) else None
        if type(ranks) is not int or not 1 <= ranks <= _MOST_RANKS or not isinstance(specs, dict):
            self._refuse(f"{METADATA_NAME} has no num_ranks or no tensor_specs")
        checked = {}
        for name, spec in specs.items():
            shape, dim = (spec.get(key) if isinstance(spec, dict) else None for key in ("full_shape", "shard_dim"))
            is_shape = isinstance(shape, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in shape)
            if not is_shape or shape is None or type(dim) is not int or not 0 <= dim < len(shape):
                self._refuse(f"{METADATA_NAME} has no full_shape with a shard_dim of it", name)
            checked[name] = tuple(shape), dim
        return ranks, checked

    def _read_headers(self, ranks: int, specs: Mapping[str, tuple[tuple[int, ...], int]]) -> None:
        beyond = os.path.join(self.path, _file_name(ranks))
        if os.path.exists(beyond):
            self._refuse(
                f"it is of {ranks} ranks, and {_file_name(ranks)} is there: files of two checkpoints are mixed"
            )
        found: dict[str, list[tuple[int, StoredTensor]]] = {}
        for rank in range(ranks):
            for name, stored in self._header(rank).items():
                found.setdefault(name, []).append((rank, stored))
        for name, places in found.items():
            if name in specs:
                self._add_sharded(name, places, ranks, *specs[name])
            elif self._are_equal(places):
                self._add_whole(name, *places[0])
            else:
                for rank, stored in places:
                    own = f"{name}@rank_{rank}"
                    if own in found:
                        self._refuse(f"it differs between ranks, and {own!r} is a tensor of the files", name)
                    self._add_whole(own, rank, stored)
        for name in specs:
            if name not in found:
                self._refuse(f"it is in {METADATA_NAME}, and no file has it", name)

    def _header(self, rank: int) -> dict[str, StoredTensor]:
        file = self._files.open(_file_name(rank))
        first = file.read(0, min(LENGTH_BYTES, file.nbytes))
        length = header_length(first, file.nbytes, file.path)
        return decode_header(file.read(0, length), file.nbytes, file.path)[0]

    def _add_whole(self, name: str, rank: int, stored: StoredTensor) -> None:
        self.tensors[name] = (stored.dtype, stored.shape)
        self._chunks[name] = [Chunk((0,) * len(stored.shape), stored.shape, (_file_name(rank), stored))]

    def _add_sharded(
        self, name: str, places: list[tuple[int, StoredTensor]], ranks: int, shape: tuple[int, ...], dim: int
    ) -> None:
        if len(places) != ranks:
            missing = min(set(range(ranks)) - {rank for rank, _ in places})
            self._refuse(f"{_file_name(missing)} has no piece of it", name)
        chunks, position = [], 0
        dtype = places[0][1].dtype
        for rank, stored in places:
            rest = (*shape[:dim], *shape[dim + 1 :])
            if stored.dtype != dtype:
                self._refuse(f"{_file_name(rank)} has {stored.dtype}, and {_file_name(0)} has {dtype}", name)
            if len(stored.shape) != len(shape) or (*stored.shape[:dim], *stored.shape[dim + 1 :]) != rest:
                text = f"{_file_name(rank)} has shape {stored.shape}, no piece of {shape} along dim {dim}"
                self._refuse(text, name)
            start = tuple(position if one == dim else 0 for one in range(len(shape)))
            chunks.append(Chunk(start, stored.shape, (_file_name(rank), stored)))
            position += stored.shape[dim]
        if position != shape[dim]:
            self._refuse(f"its pieces have {position} along dim {dim} together, and its full_shape is {shape}", name)
        self.tensors[name] = (dtype, shape)
        self._chunks[name] = chunks

    def _are_equal(self, places: list[tuple[int, StoredTensor]]) -> bool:
        """Say whether all ranks that have a whole tensor have the same bytes of it."""
        first_rank, first = places[0]
        for rank, stored in places[1:]:
            if (stored.dtype, stored.shape) != (first.dtype, first.shape):
                return False
            for at in range(0, first.end - first.begin, BUFFER_BYTES):
                nbytes = min(BUFFER_BYTES, first.end - first.begin - at)
                one = self._files.open(_file_name(first_rank)).read(first.begin + at, nbytes)
                if one != self._files.open(_file_name(rank)).read(stored.begin + at, nbytes):
                    return False
        return True

    def read(self, name: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Read one tensor; see `TensorSource.read`."""
        out = destination(self, name, out)
        for chunk in self._chunks[name]:
            file, stored = chunk.where
            read_elements(self._files.open(file), stored.begin, chunk.box_of(out))
        return out

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _refuse(self, fault: str, tensor: str | None = None) -> NoReturn:
        at = self.path if tensor is None else f"{self.path}: tensor {tensor!r}"
        raise CheckpointDamaged(f"{at}: {fault}", path=self.path, tensor=tensor)


def _file_name(rank: int) -> str:
    return f"rank_{rank}{SUFFIX}"
