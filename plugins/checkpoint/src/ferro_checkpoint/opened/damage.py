"""The message for bytes that are not those that were written."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

import numpy as np

from ferro_checkpoint.errors import CheckpointError
from ferro_checkpoint.layout.header import LENGTH_BYTES, StoredTensor, decode_header, header_length
from ferro_checkpoint.layout.json_text import shown
from ferro_checkpoint.layout.record import Record
from ferro_checkpoint.opened.files import CheckpointFiles, CheckpointReplaced


def damage_text(path: str, begin: int, end: int, tensors: Sequence[str]) -> str:
    """Say that a range of a file is damaged, and which tensors are in it."""
    named = ", ".join(shown(name) for name in tensors[:3])
    more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    what = f"tensors {named}{more}" if len(tensors) > 1 else f"tensor {named}" if tensors else "no tensor's data"
    return (
        f"{path}: bytes {begin} to {end - 1} ({what}) are not those that were written: load an older checkpoint; "
        f"`ferro checkpoint verify` lists all damage"
    )


class HeaderNames:
    """The tensors of a checkpoint's files by their headers as they are; each header is read once."""

    def __init__(self, files: CheckpointFiles, record: Record) -> None:
        self._files = files
        self._bundles = {file: bundle for bundle, names in record.bundles.items() for file in names}
        self._latest: tuple[str, list[str], list[int], list[int]] | None = None

    def within(self, file: str, begin: int, end: int) -> list[str]:
        """List the tensors in a range of a file; none where its header cannot be read."""
        if self._latest is None or self._latest[0] != file:
            found = sorted((it.begin, it.end, name) for name, it in self._read(file).items() if it.begin < it.end)
            names = [f"{self._bundles[file]}.{name}" for _, _, name in found]
            self._latest = (file, names, [first for first, _, _ in found], [last for _, last, _ in found])
        _, names, begins, ends = self._latest
        return names[bisect_right(ends, begin) : bisect_left(begins, end)]

    def _read(self, file: str) -> Mapping[str, StoredTensor]:
        if file not in self._bundles:
            return {}
        try:
            with self._files.opened(file) as handle:
                start = np.empty(min(LENGTH_BYTES, handle.nbytes), np.uint8)
                handle.read_into([start.data], 0)
                header = np.empty(header_length(start.tobytes(), handle.nbytes, file), np.uint8)
                handle.read_into([header.data], 0)
                return decode_header(header.tobytes(), handle.nbytes, file)[0]
        except CheckpointReplaced:
            raise
        except CheckpointError:
            return {}
