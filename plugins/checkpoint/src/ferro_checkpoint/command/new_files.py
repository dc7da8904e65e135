"""Files of tensors that are to be written from a source: which tensors each has, and its bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ferro.errors import UsageError
from ferro_checkpoint.command.source import NamedTensors, TensorInfo
from ferro_checkpoint.layout.bundle import Described, TensorFile, encode_index, index_name, layout_bundle
from ferro_checkpoint.layout.dtypes import ITEM_BYTES
from ferro_checkpoint.layout.header import MOST_HEADER_BYTES, name_fault

ONE_FILE = 1 << 62
"""More bytes than any file has: all tensors go into one."""


@dataclass(frozen=True, slots=True)
class NewFiles:
    """The files of some bundles.

    Attributes:
        source: of the tensors.
        files: in the order in which they are to be written.
        bundles: the names of each one's files.
        names: of the tensors in the source, by file and name in the file.
        indexes: the content of each index, by its name.
    """

    source: NamedTensors
    files: tuple[TensorFile, ...]
    bundles: Mapping[str, tuple[str, ...]]
    names: Mapping[str, Mapping[str, str]]
    indexes: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the indexes."""
        return sum(file.nbytes for file in self.files)

    def content(self, file: TensorFile) -> Iterator[memoryview]:
        """Read the bytes of a file, a few MiB at a time; each part is of use until the next one is read."""
        yield memoryview(file.header)
        for name in file.tensors:
            for piece in self.source.pieces(self.names[file.name][name]):
                yield piece.data


def lay_out(source: NamedTensors, bundles: Mapping[str, Mapping[str, str]], file_bytes: int) -> NewFiles:
    """Choose the files.

    Args:
        source: of the tensors.
        bundles: of each the names that its tensors get in a file, and those that they have in the source.
        file_bytes: of data in a file, unless it has one tensor alone.

    Raises:
        UsageError: a tensor cannot be in such a file.
    """
    files: list[TensorFile] = []
    indexes: dict[str, bytes] = {}
    names: dict[str, Mapping[str, str]] = {}
    of_bundles: dict[str, tuple[str, ...]] = {}
    for bundle, its in bundles.items():
        described = {name: _stored(old, source.tensors[old]) for name, old in its.items()}
        for name in its:
            if fault := name_fault(name):
                raise UsageError(f"{name!r}: {fault}")
        laid_out = layout_bundle(bundle, described, file_bytes)
        for file in laid_out:
            if len(file.header) > MOST_HEADER_BYTES:
                raise UsageError(f"{file.name} would have a header of more than {MOST_HEADER_BYTES} bytes: use --only")
            names[file.name] = its
        files += laid_out
        of_bundles[bundle] = tuple(file.name for file in laid_out)
        if len(laid_out) > 1:
            indexes[index_name(bundle)] = encode_index(laid_out)
    return NewFiles(source, tuple(files), of_bundles, names, indexes)


def _stored(name: str, tensor: TensorInfo) -> Described:
    if tensor.dtype == "complex128":
        return "F64", (*tensor.shape, 2)
    if tensor.dtype not in ITEM_BYTES:
        raise UsageError(f"{name!r} has dtype {tensor.dtype}, which no safetensors file has: leave it out with --only")
    return tensor.dtype, tensor.shape
