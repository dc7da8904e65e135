"""Segments: the ranges of files that ranks write, each by one rank and with one digest.

A range that one set of ranks holds is cut into segments that one of them writes from its own memory. Ranges that are
too small for that are written together by one rank, and the others send it what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ferro_checkpoint.plan.file_layout import FileLayout
from ferro_checkpoint.plan.rows import HEADER, Rows

Indices = NDArray[np.int64]

SEGMENT_BYTES = 4 << 20
SMALL_SEGMENT_BYTES = 256 << 10  # of small states, so that every rank has its share of them
_SEGMENTS_OF_A_RANK = 8  # at least, unless they would be smaller than that
EXCHANGED_BYTES = 1 << 20  # of a segment of which ranks send each other parts
LEAST_OWN_BYTES = (
    64 << 10
)  # of a range that is worth a segment of its own; a write and a digest cost less than sending it
_PAGE = 4096


@dataclass(slots=True)
class Segments:
    """All segments, in order of their addresses; they cover all files.

    Attributes:
        begin: each one's first address.
        end: one more than its last.
        writer: the rank that writes it.
        first_row: the first of the rows that lie in it.
        last_row: one more than the last.
        exchanged: whether the writer may need parts of it from other ranks.
    """

    begin: list[int]
    end: list[int]
    writer: list[int]
    first_row: list[int]
    last_row: list[int]
    exchanged: list[bool]


def cut_segments(rows: Rows, layout: FileLayout, world_size: int, *, whole_files: bool = False) -> Segments:
    """Cut all files into segments, and give each a writer, so that the ranks write nearly the same number of bytes.

    Args:
        rows: all bytes, by who holds them.
        layout: the files.
        world_size: number of ranks.
        whole_files: one rank writes all segments of a file, as a store demands that takes files only as a whole.
    """
    regions = _regions(rows, layout)
    most = _segment_bytes(layout.bases[-1], world_size)
    segments = Segments([], [], [], [], [], [])
    keys: list[int] = []
    for begin, end, first, last, key in regions:
        size = min(EXCHANGED_BYTES, most) if key < 0 else most
        base = layout.bases[layout.file_at(begin)]
        at, row = begin, first
        while at < end:
            # No element lies across a page of its file: the tensors of larger elements come first.
            to = min(end, at + size - (at + size - base) % _PAGE) if end - at > size else end
            until = row + int(np.searchsorted(rows.begin[row:last], to))
            segments.begin.append(at)
            segments.end.append(to)
            segments.first_row.append(row)
            segments.last_row.append(until)
            segments.exchanged.append(key < 0)
            keys.append(key)
            row = until - 1 if int(rows.end[until - 1]) > to else until
            at = to
    if whole_files:
        _give_files(segments, layout, world_size)
    else:
        _give_segments(segments, keys, rows, world_size, most)
    return segments


def _segment_bytes(nbytes: int, world_size: int) -> int:
    """Choose the size of segments of a checkpoint: whole pages."""
    fitting = nbytes // (_SEGMENTS_OF_A_RANK * world_size) // _PAGE * _PAGE
    return min(max(fitting, SMALL_SEGMENT_BYTES), SEGMENT_BYTES)


def _regions(rows: Rows, layout: FileLayout) -> list[tuple[int, int, int, int, int]]:
    """Join neighbouring rows: begin, end, first row, one more than the last, the holders' key or -1 if they differ."""
    number = len(rows.begin)
    if not number:
        return []
    file_of = np.searchsorted(np.array(layout.bases), rows.begin, side="right")
    # A header is a segment of its own, so that opening a checkpoint, which checks its digest, reads nothing else. The
    # ranks that load would otherwise read 4 MiB each: 6 % more than they need, with 4 ranks and 256 MiB.
    header = rows.tensor == HEADER
    new = np.ones(number, bool)
    new[1:] = (rows.key[1:] != rows.key[:-1]) | (file_of[1:] != file_of[:-1]) | header[:-1]
    first = np.flatnonzero(new)
    last = np.append(first[1:], number)
    begin, end, key = rows.begin[first], rows.end[last - 1], rows.key[first]
    mixed = (key < 0) | (end - begin < LEAST_OWN_BYTES)
    # Neighbouring mixed ones of one file become one region.
    start = np.ones(len(first), bool)
    start[1:] = ~(mixed[1:] & mixed[:-1]) | (file_of[first][1:] != file_of[first][:-1]) | header[first][:-1]
    at = np.flatnonzero(start)
    to = np.append(at[1:], len(first)) - 1
    joined = np.where((to > at) | (key[at] < 0), -1, key[at])
    return list(
        zip(begin[at].tolist(), end[to].tolist(), first[at].tolist(), last[to].tolist(), joined.tolist(), strict=True)
    )


def _give_files(segments: Segments, layout: FileLayout, world_size: int) -> None:
    """Give each file to the rank that has the fewest bytes to write."""
    load, owners = [0] * world_size, []
    for base, after in zip(layout.bases, layout.bases[1:], strict=False):
        owner = load.index(min(load))
        owners.append(owner)
        load[owner] += after - base
    segments.writer = [owners[layout.file_at(begin)] for begin in segments.begin]
    segments.exchanged = [True] * len(segments.begin)


def _give_segments(segments: Segments, keys: Sequence[int], rows: Rows, world_size: int, segment_bytes: int) -> None:
    """Give each segment to a rank that holds it, unless it has far more to write than others already."""
    sizes = [end - begin for begin, end in zip(segments.begin, segments.end, strict=True)]
    load = [0] * world_size
    writers = [-1] * len(sizes)
    most = sum(sizes) // world_size + segment_bytes
    choices: dict[int, list[int]] = {}
    later = []
    for number, (size, key, row) in enumerate(zip(sizes, keys, segments.first_row, strict=True)):
        if 0 <= key < world_size and load[key] + size <= most:
            writers[number] = key
            load[key] += size
        else:
            later.append(number)
            if key not in choices:
                choices[key] = rows.of(row) if key > world_size else list(range(world_size))
    for number in later:
        ranks = choices[keys[number]]
        writer = min(ranks, key=load.__getitem__)
        if load[writer] + sizes[number] > most:
            writer = load.index(min(load))
        writers[number] = writer
        load[writer] += sizes[number]
        key = keys[number]
        if (0 <= key < world_size and key != writer) or (key > world_size and writer not in ranks):
            segments.exchanged[number] = True
    segments.writer = writers
