"""Cut a stream of bytes into lines, and into the pieces by which progress bars redraw theirs."""

from __future__ import annotations

import re

MAX_SEGMENT_BYTES = 64 * 1024

_END = re.compile(rb"\r\n|\n|\r")


class Segments:
    r"""Cuts after each "\n" and each "\r", and within lines of 64 KiB and more.

    No byte is lost or changed. A "\r\n" that arrives in one piece ends one segment; a "\r" at
    the end of a piece ends one too, since a progress bar must not wait for what follows.
    """

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take what arrived; return the segments that are complete, each with its end."""
        data = self._partial + data
        segments: list[bytes] = []
        start = 0
        for end in _END.finditer(data):
            start = _cut_long(data, start, end.end(), segments)
            segments.append(data[start : end.end()])
            start = end.end()
        start = _cut_long(data, start, len(data), segments)
        self._partial = data[start:]
        return segments

    def flush(self) -> bytes:
        """What is left without an end, at the end of the stream."""
        rest, self._partial = self._partial, b""
        return rest


def _cut_long(data: bytes, start: int, stop: int, segments: list[bytes]) -> int:
    """Cut full segments off the front of `data[start:stop]`; return where the rest begins."""
    while stop - start > MAX_SEGMENT_BYTES:
        segments.append(data[start : start + MAX_SEGMENT_BYTES])
        start += MAX_SEGMENT_BYTES
    return start
