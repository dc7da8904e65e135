"""Saves and loads take little memory beside the state."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import ferro
import ferro_checkpoint
from ferro_checkpoint import ArrayPiece

ROWS, COLUMNS = 6000, 4000  # 96 MB


def piece_of(how: str, rank: int) -> ArrayPiece:
    if how == "by columns":
        shape = (ROWS, COLUMNS // 2)
        return ArrayPiece((ROWS, COLUMNS), np.zeros(shape, "f4"), (0, rank * COLUMNS // 2), shape)
    return ArrayPiece.whole(np.zeros((ROWS, COLUMNS), "f4", order="F" if how == "Fortran order" else "C"))


# Some segments that are copied to be written or read; by columns also a round of an exchange, on both ranks.
@pytest.mark.parametrize(
    ("how", "most_bytes"), [("C order", 16 << 20), ("Fortran order", 24 << 20), ("by columns", 2 * (40 << 20))]
)
def test_memory_is_bounded(tmp_path, how, most_bytes):
    def run(group):
        state = {"m": {"w": piece_of(how, group.rank)}}
        group.barrier()
        if group.rank == 0:
            tracemalloc.start()
        group.barrier()
        peaks = []
        for what in (ferro_checkpoint.save, ferro_checkpoint.load):
            what(tmp_path / "c", state, group)
            group.barrier()
            peaks.append(tracemalloc.get_traced_memory()[1])
        return peaks

    try:
        peaks = ferro.simulate(run, 2 if how == "by columns" else 1, timeout_s=60, run_timeout_s=120)[0]
    finally:
        tracemalloc.stop()
    assert max(peaks) < most_bytes
