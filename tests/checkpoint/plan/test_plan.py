"""The plan of a save is the same on all ranks, covers every byte once, and shares the bytes evenly."""

from __future__ import annotations

import numpy as np
import pytest

import ferro
import ferro_checkpoint
from ferro_checkpoint import ArrayPiece
from ferro_checkpoint.layout.record import Record
from ferro_checkpoint.plan.segments import SEGMENT_BYTES, SMALL_SEGMENT_BYTES
from ferro_checkpoint.saving.save_plan import plan_save
from ferro_checkpoint.saving.snapshot import Snapshot
from ferro_checkpoint.saving.write import write_checkpoint
from ferro_checkpoint.storage.opening import split_path

from ..placements import Holder, bits, held, random_arrays


def on_ranks(world_size, function):
    return ferro.simulate(function, world_size, timeout_s=20, run_timeout_s=60)


def test_plans_agree_and_cover_all_bytes():
    for seed in range(300, 320):
        n = seed % 5 + 2
        states = held(seed, random_arrays(seed), n, fill=True)
        plans = on_ranks(n, lambda group: plan_save({"a": Holder(states[group.rank])}, group))  # noqa: B023
        first = plans[0]
        segments = first.segments
        assert segments.begin == [0, *segments.end[:-1]]
        assert segments.end[-1] == first.nbytes == sum(plan.written_bytes for plan in plans)
        for plan in plans[1:]:
            for field in ("begin", "end", "writer", "exchanged"):
                assert getattr(plan.segments, field) == getattr(segments, field)
            assert plan.exchanged == first.exchanged
        for number, (begin, end) in enumerate(zip(segments.begin, segments.end, strict=True)):
            assert end - begin <= SEGMENT_BYTES
            lists = [list(plan.supplies.of(number)) for plan in plans]
            assert all(each == lists[0] for each in lists)
            assert sum(part.nbytes for part in lists[0]) == end - begin


ROWS, COLUMNS = 24_000, 1000  # 96 MB, of which no element is touched before it is written


def piece_of(kind: str, rank: int, n: int) -> ArrayPiece:
    shape = (ROWS, COLUMNS)
    if kind == "columns":
        return ArrayPiece(shape, np.zeros((ROWS, COLUMNS // n), "f4"), (0, rank * (COLUMNS // n)), (ROWS, COLUMNS // n))
    if kind == "uneven rows":  # rank 0 has half of all
        cuts = [0, *(ROWS // 2 + ROWS // 2 * k // (n - 1) for k in range(n))]
        rows = cuts[rank + 1] - cuts[rank]
        return ArrayPiece(shape, np.zeros((rows, COLUMNS), "f4"), (cuts[rank], 0), (rows, COLUMNS))
    if kind == "one has all":
        whole = ArrayPiece.whole(np.zeros(shape, "f4"))
        return whole if rank == 1 else ArrayPiece(shape, np.zeros(0, "f4"), (0, 0), shape, (0, 0))
    return ArrayPiece.whole(np.zeros(shape, "f4"))


@pytest.mark.parametrize("kind", ["replicated", "columns", "uneven rows", "one has all"])
def test_ranks_write_the_same_number_of_bytes(kind):
    n = 4
    plans = on_ranks(n, lambda group: plan_save({"m": Holder({"w": piece_of(kind, group.rank, n)})}, group))
    written = [plan.written_bytes for plan in plans]
    assert sum(written) >= ROWS * COLUMNS * 4
    assert max(written) - min(written) <= 2 * SEGMENT_BYTES


def test_a_small_state_is_shared_evenly_as_well():
    state = {"m": {"a": np.zeros(500_000, "f4"), "b": np.zeros((300, 800), "f4")}}
    written = [plan.written_bytes for plan in on_ranks(3, lambda group: plan_save(state, group))]
    assert max(written) - min(written) <= SMALL_SEGMENT_BYTES


def test_a_plan_is_used_again_and_a_snapshot_does_not_change(tmp_path):
    seed, n = 7, 3
    arrays = random_arrays(seed)
    storage, _ = split_path(tmp_path / "c")

    def run(group):
        pieces = held(seed, arrays, n, fill=True)[group.rank]
        plan = plan_save({"a": Holder(pieces), "k": 1}, group)
        again = plan_save({"a": Holder(pieces), "k": 2}, group, previous=plan)
        assert again is plan
        snapshot = Snapshot(again)
        buffer = np.empty(again.staged_bytes, np.uint8)
        for each in pieces.values():
            for piece in each:
                piece.data[...] = np.zeros((), piece.data.dtype)
        write_checkpoint(again, snapshot, storage, "c", group, step=4)
        zeros = Snapshot(again, buffer)
        write_checkpoint(again, zeros, storage, "zeros", group, step=5)
        # Another state on one rank alone: all of them plan anew.
        if group.rank == 1:
            pieces["new"] = [ArrayPiece((2,), np.ones(2), (0,), (2,), None, False, False)]
        other = plan_save({"a": Holder(pieces), "k": 2}, group, previous=again)
        assert other is not plan
        write_checkpoint(other, None, storage, "other", group)

    on_ranks(n, run)
    loaded = ferro_checkpoint.load(tmp_path / "c")
    assert loaded["k"] == 2
    assert {name: bits(array) for name, array in loaded["a"].items()} == {n: bits(array) for n, array in arrays.items()}
    assert not any(any(bits(array)) for array in ferro_checkpoint.load(tmp_path / "zeros")["a"].values())
    assert ferro_checkpoint.load(tmp_path / "other")["a"]["new"].tolist() == [1, 1]
    record = Record.decode((tmp_path / "c" / "ferro.json").read_bytes(), "")
    assert (record.step, record.saved_by["world_size"]) == (4, n)
