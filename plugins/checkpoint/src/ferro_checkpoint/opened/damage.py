"""The message for bytes that are not those that were written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro_checkpoint.errors import CheckpointError
from ferro_checkpoint.layout.header import LENGTH_BYTES, decode_header, header_length
from ferro_checkpoint.layout.json_text import shown
from ferro_checkpoint.layout.record import Record
from ferro_checkpoint.opened.files import CheckpointFiles


def damage_text(path: str, begin: int, end: int, tensors: Sequence[str]) -> str:
    """Say that a range of a file is damaged, and which tensors are in it."""
    named = ", ".join(shown(name) for name in tensors[:3])
    more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    what = f"tensors {named}{more}" if len(tensors) > 1 else f"tensor {named}" if tensors else "no tensor's data"
    return (
        f"{path}: bytes {begin} to {end - 1} ({what}) are not those that were written: load an older checkpoint; "
        f"`ferro checkpoint verify` lists all damage"
    )


def tensors_by_header(files: CheckpointFiles, record: Record, file: str, begin: int, end: int) -> list[str]:
    """List the tensors in a range of a file, by its header as it is; none where that cannot be read."""
    bundle = next((bundle for bundle, names in record.bundles.items() if file in names), None)
    if bundle is None:
        return []
    try:
        with files.opened(file) as handle:
            start = np.empty(min(LENGTH_BYTES, handle.nbytes), np.uint8)
            handle.read_into([start.data], 0)
            header = np.empty(header_length(start.tobytes(), handle.nbytes, file), np.uint8)
            handle.read_into([header.data], 0)
            tensors, _ = decode_header(header.tobytes(), handle.nbytes, file)
    except CheckpointError:
        return []
    return [f"{bundle}.{name}" for name, it in tensors.items() if it.begin < end and it.end > begin]
