"""Checkpoints written for tests, byte by byte as the layout says, by one process and no group."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.layout.bundle import encode_index, index_name, layout_bundle
from ferro_checkpoint.layout.digest import DIGEST, digest_of
from ferro_checkpoint.layout.dtypes import dtype_name
from ferro_checkpoint.layout.record import RECORD_NAME, FileRecord, Record


def write(directory: Path, bundles, *, values=None, step=None, file_bytes=4 << 30, segment_bytes=4 << 20, **changes):
    """Write {bundle: {name: array}}; `changes` replace fields of the record."""
    directory.mkdir(parents=True)
    names, files = {}, {}
    for bundle, arrays in bundles.items():
        stored = {}
        for name, array in arrays.items():
            array = np.asarray(array)
            if array.dtype == np.complex128:
                values = values or {}
                values.setdefault("$complex128", []).append(f"{bundle}.{name}")
                array = array.view(np.float64).reshape(*array.shape, 2)
            stored[name] = array
        described = {name: (dtype_name(array.dtype, name), array.shape) for name, array in stored.items()}
        laid_out = layout_bundle(bundle, described, file_bytes)
        names[bundle] = tuple(file.name for file in laid_out)
        for file in laid_out:
            data = b"".join(stored[name].tobytes() for name in file.tensors)
            files[file.name] = (file.header + data, len(file.header))
        if len(laid_out) > 1:
            files[index_name(bundle)] = (encode_index(laid_out), 0)
    for name, (content, _) in files.items():
        (directory / name).write_bytes(content)
    record = {
        "step": step,
        "bundles": names,
        "files": {name: file_record(content, header, segment_bytes) for name, (content, header) in files.items()},
        "values": values or {},
        "digest": DIGEST,
        "saved_by": {"ferro": "0.1.0", "world_size": 1},
    }
    (directory / RECORD_NAME).write_bytes(Record(**(record | changes)).encode())


def file_record(content, header=0, segment_bytes=4 << 20):
    cuts = sorted({*range(header, len(content), segment_bytes), len(content)} - {0})
    parts = [memoryview(content)[begin:end] for begin, end in zip([0, *cuts], cuts, strict=False)]
    return FileRecord(len(content), tuple(cuts), tuple(digest_of([part]) for part in parts))


class LocalStandIn:
    """As much of a storage as reading needs."""

    writes_ranges = True

    def __init__(self, path):
        self.path = str(path)
        self.opened = 0

    def names(self):
        return sorted(it for it in os.listdir(self.path) if not it.startswith(".tmp-"))

    def exists(self, name):
        return os.path.lexists(f"{self.path}/{name}")

    def read_file(self, name, file, most_bytes):
        content = Path(self.path, name, file).read_bytes()
        if len(content) > most_bytes:
            raise CheckpointDamaged("too large", path=file)
        return content

    def open_file(self, name, file):
        self.opened += 1
        return _File(f"{self.path}/{name}/{file}")


class _File:
    def __init__(self, path):
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115 - close() closes it
        self.nbytes = os.fstat(self._file.fileno()).st_size

    def identity(self):
        stat = os.fstat(self._file.fileno())
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def read_into(self, destinations, offset):
        for destination in destinations:
            if destination.nbytes and os.preadv(self._file.fileno(), [destination], offset) < destination.nbytes:
                raise CheckpointDamaged("the file ends before", path=self._file.name)
            offset += destination.nbytes

    def close(self):
        self._file.close()
