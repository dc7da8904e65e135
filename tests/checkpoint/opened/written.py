"""Checkpoints written for tests, byte by byte as the layout says, by one process and no group."""

from __future__ import annotations

from pathlib import Path

import numpy as np

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
