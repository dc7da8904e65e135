"""An archive that torch.save has written: a zip file whose data.pkl says what its storages, uncompressed, are.

    | archive/data.pkl     the pickle; a storage in it is a persistent id ("storage", class, key, device, elements)
    | archive/byteorder    "little" or "big"
    | archive/data/KEY     the bytes of a storage
    | …
    | the central directory of the zip file, its zip64 end and locator (where there are), and its end

Sources: PKWARE's APPNOTE.TXT 6.3.9, sections 4.3.7 to 4.3.16; torch/serialization.py, `_save`.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any, NoReturn

from numpy.typing import NDArray

from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.formats.input_file import InputFile, read_elements
from ferro_checkpoint.formats.pickle_names import Built
from ferro_checkpoint.formats.pickle_reader import MOST_PICKLE_BYTES, read_pickle
from ferro_checkpoint.formats.torch_names import ARCHIVE_NAMES, MOST_DIMS, StorageClass, TorchDtype, TorchSize

_END, _END64, _LOCATOR64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_ENTRY, _LOCAL = b"PK\1\2", b"PK\3\4"
_MOST_DIRECTORY_BYTES = 1 << 20
_UNKNOWN32 = 0xFFFFFFFF  # the number is in the zip64 field


@dataclass(frozen=True, slots=True)
class _Record:
    """A file of the archive: where its own header is within the archive, its length, and its CRC-32 (0: not known)."""

    header: int
    nbytes: int
    crc32: int


class TorchArchive:
    """An archive that is a range of a file."""

    def __init__(self, file: InputFile, begin: int, end: int) -> None:
        self._file = file
        self._begin = begin
        self._nbytes = end - begin
        self._records = self._directory()
        pickles = [name for name in self._records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            self._refuse("it has no data.pkl")
        self._prefix = pickles[0].removesuffix("data.pkl")

    def value(self) -> Any:
        """Return the object that was saved, tensors in it as `Built`.

        Raises:
            RefusedPickle: it holds an object of a class that is not read.
        """
        data = self._content(f"{self._prefix}data.pkl")
        return read_pickle(data, ARCHIVE_NAMES, f"{self._file.path} at byte {self._begin}", _storage)

    def read_tensor(self, target: NDArray[Any], dtype: str) -> None:
        """Read the one tensor that was saved into `target`, which has its shape.

        Args:
            target: for its elements; may have any strides.
            dtype: that the tensor must have.
        """
        value = self.value()
        while isinstance(value, Built) and value.kind == "parameter" and value.args:
            value = value.args[0]
        storage, first, strides, stored_dtype = self._described(value, target.shape)
        if stored_dtype != dtype:
            self._refuse(f"its tensor is {stored_dtype}, and {dtype} in the metadata")
        begin, record = self._data(f"{self._prefix}data/{storage.args[2]}")
        begin += first * target.itemsize
        if first * target.itemsize + target.nbytes > record.nbytes:
            self._refuse(f"its tensor {target.shape} does not fit a storage of {record.nbytes} bytes")
        order = sorted(range(target.ndim), key=lambda dim: -strides[dim])
        elements = 1
        for dim in reversed([dim for dim in order if target.shape[dim] != 1]):
            if strides[dim] != elements:
                self._refuse(f"its tensor {target.shape} has strides {strides}, with holes or overlaps")
            elements *= target.shape[dim]
        checked = record.crc32 != 0 and target.nbytes == record.nbytes
        crc = 0

        def add(memory: memoryview) -> None:
            nonlocal crc
            crc = zlib.crc32(memory, crc)

        read_elements(self._file, begin, target.transpose(order), add if checked else None)
        if checked and crc != record.crc32:
            self._refuse("its data are not what was written: the CRC-32 differs")
        if self._is_big_endian():
            swapped = target if target.dtype.kind in "biufc" else target.view(f"u{target.itemsize}")
            swapped.byteswap(inplace=True)

    def _described(self, value: Any, shape: tuple[int, ...]) -> tuple[Built, int, tuple[int, ...], str]:
        """Return a tensor's storage, its first element there, its strides and its dtype, all checked."""
        if not isinstance(value, Built) or not value.kind.startswith("tensor") or len(value.args) < 4:
            self._refuse("it holds no tensor")
        storage, first, size, strides = value.args[:4]
        if not isinstance(storage, Built) or storage.kind != "storage":
            self._refuse("its tensor has no storage")
        if not _are_sizes(size) or tuple(size) != shape or not _are_sizes(strides) or len(strides) != len(shape):
            self._refuse(f"its tensor has another shape than {shape}, which the metadata say")
        dtype = value.args[6] if value.kind == "tensor with dtype" and len(value.args) > 6 else storage.args[1]
        if not isinstance(dtype, (TorchDtype, StorageClass)) or not dtype or not _are_sizes((first,)):
            self._refuse("its tensor has no dtype, or no place in its storage")
        return storage, first, tuple(strides), str(dtype)

    def _is_big_endian(self) -> bool:
        name = f"{self._prefix}byteorder"
        return name in self._records and self._content(name) == b"big"

    def _content(self, name: str) -> bytes:
        begin, record = self._data(name)
        if record.nbytes > MOST_PICKLE_BYTES:
            self._refuse(f"{name} has {record.nbytes} bytes, and is read up to {MOST_PICKLE_BYTES}")
        content = self._file.read(begin, record.nbytes)
        if record.crc32 and zlib.crc32(content) != record.crc32:
            self._refuse(f"{name} is not what was written: the CRC-32 differs")
        return content

    def _data(self, name: str) -> tuple[int, _Record]:
        """Return the position in the file of a record's bytes, and the record."""
        record = self._records.get(name)
        if record is None:
            self._refuse(f"it has no {name!r}")
        header = self._read(record.header, 30)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:])
        if header[:4] != _LOCAL or self._read(record.header + 30, name_bytes) != name.encode():
            self._refuse(f"{name!r} is not where the directory says")
        begin = record.header + 30 + name_bytes + extra_bytes
        if begin + record.nbytes > self._nbytes:
            self._refuse(f"{name!r} reaches beyond it")
        return self._begin + begin, record

    def _directory(self) -> dict[str, _Record]:
        """Read the central directory."""
        end = self._read(self._nbytes - 22, 22)
        if end[:4] != _END:
            self._refuse("it is no zip file that ends here, as torch.save writes it")
        count, nbytes, begin = struct.unpack("<HII", end[10:20])
        if self._nbytes >= 42 and (locator := self._read(self._nbytes - 42, 20))[:4] == _LOCATOR64:
            end64 = self._read(struct.unpack("<Q", locator[8:16])[0], 56)
            if end64[:4] != _END64:
                self._refuse("its zip64 end is not where its locator says")
            count, nbytes, begin = struct.unpack("<QQQ", end64[32:56])
        if nbytes > _MOST_DIRECTORY_BYTES:
            self._refuse(f"its directory has {nbytes} bytes")
        directory = self._read(begin, nbytes)
        records: dict[str, _Record] = {}
        at = 0
        while at + 46 <= len(directory) and directory[at : at + 4] == _ENTRY:
            name, record, at = self._entry(directory, at)
            if name in records:
                self._refuse(f"it has {name!r} twice")
            records[name] = record
        if at != len(directory) or len(records) != count:
            self._refuse("its directory is damaged")
        return records

    def _entry(self, directory: bytes, at: int) -> tuple[str, _Record, int]:
        method, crc, packed, nbytes = struct.unpack("<H4xIII", directory[at + 10 : at + 28])
        name_bytes, extra_bytes, comment_bytes = struct.unpack("<HHH", directory[at + 28 : at + 34])
        (header,) = struct.unpack("<I", directory[at + 42 : at + 46])
        name = directory[at + 46 : at + 46 + name_bytes].decode(errors="replace")
        extra = directory[at + 46 + name_bytes : at + 46 + name_bytes + extra_bytes]
        wide = _zip64_numbers(extra)
        nbytes, packed, header = (
            wide.pop(0) if number == _UNKNOWN32 and wide else number for number in (nbytes, packed, header)
        )
        if method != 0 or packed != nbytes:
            self._refuse(f"{name!r} is compressed, which torch.save does not do")
        return name, _Record(header, nbytes, crc), at + 46 + name_bytes + extra_bytes + comment_bytes

    def _read(self, begin: int, nbytes: int) -> bytes:
        if not 0 <= begin <= begin + nbytes <= self._nbytes:
            self._refuse(f"bytes {begin} to {begin + nbytes} of it are needed")
        return self._file.read(self._begin + begin, nbytes)

    def _refuse(self, fault: str) -> NoReturn:
        path = self._file.path
        text = (
            f"{path}: the {self._nbytes} bytes at byte {self._begin} are no archive of torch.save that is read: {fault}"
        )
        raise CheckpointDamaged(text, path=path)


def _storage(identity: Any) -> Built:
    """Make the stand-in of a storage of its persistent id."""
    if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
        raise ValueError("this is no storage of torch.save")
    if type(identity[1]) is not StorageClass or type(identity[2]) is not str:
        raise ValueError("a storage has no class or no key")
    return Built("storage", identity)


def _are_sizes(values: Any) -> bool:
    kinds = (tuple, TorchSize)
    return (
        type(values) in kinds and len(values) <= MOST_DIMS and all(type(v) is int and 0 <= v < 1 << 62 for v in values)
    )


def _zip64_numbers(extra: bytes) -> list[int]:
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack("<HH", extra[at : at + 4])
        field = extra[at + 4 : at + 4 + nbytes]
        if kind == 1:
            return [number for (number,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
        at += 4 + nbytes
    return []
