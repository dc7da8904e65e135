"""Write plain safetensors: one file, or a directory as Hugging Face programs and torch read it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ferro_checkpoint.errors import CheckpointError, SaveFailed, StateError
from ferro_checkpoint.formats.input_file import BUFFER_BYTES
from ferro_checkpoint.formats.source import TensorSource
from ferro_checkpoint.layout.bundle import (
    FILE_BYTES,
    SUFFIX,
    Described,
    TensorFile,
    encode_index,
    index_name,
    layout_bundle,
)
from ferro_checkpoint.layout.dtypes import ITEM_BYTES, dtype_name
from ferro_checkpoint.layout.header import MOST_HEADER_BYTES, encode_header, name_fault

Arrays: TypeAlias = "Mapping[str, NDArray[Any]] | TensorSource"
_BUNDLE = "model"
_METADATA = {"format": "pt"}  # transformers refuses a file without it; torch and other loaders do not mind it


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Arrays,
    metadata: Mapping[str, str] | None = None,
    *,
    file_bytes: int = FILE_BYTES,
    overwrite: bool = False,
) -> None:
    """Write tensors to a file (a path that ends in ".safetensors") or to a directory (any other path).

    The directory gets model.safetensors, or model-00001-of-0000N.safetensors and so on with an index. All is written
    under a temporary name beside the path, waited for until it is on disk, and renamed; after a failure
    the path has what it had before.

    Args:
        path: of the new file or directory.
        tensors: arrays by name; or a source, of which one tensor at a time is in memory.
        metadata: texts for the files' own metadata, beside {"format": "pt"}.
        file_bytes: of data in one file of a directory; a larger tensor has a file of its own.
        overwrite: replace what is there: a file, or a directory that has nothing but what this function writes.

    Raises:
        StateError: a tensor, the metadata or the path cannot be written; nothing was.
        SaveFailed: the file system failed.
    """
    target = os.fspath(path)
    described = _described(tensors)
    texts = _checked_metadata(metadata)
    if file_bytes < 1:
        raise StateError(f"file_bytes is {file_bytes}: give a positive number of bytes")
    single = target.endswith(SUFFIX)
    _check_target(target, single, overwrite)
    files = layout_bundle(_BUNDLE, described, 1 << 62 if single else file_bytes) or [
        TensorFile(_BUNDLE + SUFFIX, b"", {}, 0)
    ]
    headers = [encode_header({name: described[name] for name in file.tensors}, texts) for file in files]
    if max(map(len, headers)) > MOST_HEADER_BYTES:
        raise StateError(f"{target}: the names and shapes of a file need more than {MOST_HEADER_BYTES} bytes")
    temporary = os.path.join(
        os.path.dirname(target.rstrip("/")) or ".",
        f".tmp-{os.path.basename(target.rstrip('/'))}-{secrets.token_hex(8)}",
    )
    try:
        if single:
            _write_file(temporary, headers[0], files[0], tensors)
        else:
            os.mkdir(temporary)
            for file, header in zip(files, headers, strict=True):
                _write_file(os.path.join(temporary, file.name), header, file, tensors)
            if len(files) > 1:
                _write_bytes(os.path.join(temporary, index_name(_BUNDLE)), encode_index(files))
            _sync_directory(temporary)
        _rename(temporary, target, single)
    except OSError as error:
        raise SaveFailed(f"{target} was not written: {error}", path=target) from error
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _described(tensors: Arrays) -> dict[str, Described]:
    if isinstance(tensors, Mapping):
        described = {name: (dtype_name(array.dtype, name), array.shape) for name, array in tensors.items()}
    else:
        described = dict(tensors.tensors)
    for name, (dtype, _) in described.items():
        fault = name_fault(name) if isinstance(name, str) else "names must be texts"
        if fault:
            raise StateError(f"{name!r}: {fault}")
        if dtype not in ITEM_BYTES:
            raise StateError(f"{name!r} has dtype {dtype}, which no safetensors file has: leave it out or convert it")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise StateError(f"{name!r} is no text that a file can have") from error
    return described


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    texts = {**_METADATA, **(metadata or {})}
    for key, value in texts.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise StateError(f"metadata[{key!r}] is {value!r}: a file's own metadata are texts")
    return texts


def _check_target(target: str, single: bool, overwrite: bool) -> None:
    if not os.path.lexists(target):
        if not os.path.isdir(os.path.dirname(target.rstrip("/")) or "."):
            raise StateError(f"{target}: its directory does not exist")
        return
    if not overwrite:
        raise StateError(f"{target} exists: choose another path, or pass overwrite=True")
    if single == os.path.isdir(target):
        raise StateError(f"{target} is {'a' if single else 'no'} directory, and is not replaced")
    if not single:
        foreign = [name for name in os.listdir(target) if not name.startswith(_BUNDLE) or SUFFIX not in name]
        if foreign:
            raise StateError(f"{target} has {foreign[0]!r}, which overwrite=True does not remove: choose another path")


def _write_file(path: str, header: bytes, file: TensorFile, tensors: Arrays) -> None:
    nbytes = len(header) + file.nbytes - len(file.header)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, nbytes)
        _write_at(descriptor, memoryview(header), 0)
        offset = len(header)
        for name, stored in file.tensors.items():
            array = tensors[name] if isinstance(tensors, Mapping) else tensors.read(name)
            if array.shape != stored.shape or dtype_name(array.dtype, name) != stored.dtype:
                raise CheckpointError(
                    f"{path}: tensor {name!r} was changed while it was written", path=path, tensor=name
                )
            for memory in _in_c_order(array):
                _write_at(descriptor, memory, offset)
                offset += len(memory)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_c_order(array: NDArray[Any]) -> Iterator[memoryview]:
    """Give an array's bytes in C order; what is not contiguous is copied, a few MiB at a time."""
    if array.size == 0:
        return
    if array.flags.c_contiguous:
        yield array.reshape(-1).view(np.uint8).data
    elif array.nbytes <= BUFFER_BYTES:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    else:
        rows = max(1, BUFFER_BYTES * len(array) // array.nbytes)
        for begin in range(0, len(array), rows):
            yield from _in_c_order(array[begin : begin + rows] if rows > 1 else array[begin])


def _write_at(descriptor: int, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        done += os.pwritev(descriptor, [memory[done:]], offset + done)


def _write_bytes(path: str, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _write_at(descriptor, memoryview(content), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(temporary: str, target: str, single: bool) -> None:
    """Give the temporary file or directory its name; an older directory is put aside first and then removed."""
    target = target.rstrip("/")
    parent = os.path.dirname(target) or "."
    aside = None
    if not single and os.path.lexists(target):
        aside = os.path.join(parent, f".tmp-{os.path.basename(target)}-{secrets.token_hex(8)}")
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
        _sync_directory(parent)
    except OSError:
        if not single and not os.path.lexists(temporary):
            os.rename(target, temporary)
        if aside is not None:
            os.rename(aside, target)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
