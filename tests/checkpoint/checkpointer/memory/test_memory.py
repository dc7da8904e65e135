"""What a rank holds in memory, and who can read which segment."""

from __future__ import annotations

import numpy as np
import pytest

from ferro_checkpoint import CheckpointDamaged
from ferro_checkpoint.checkpointer.memory.held import HeldCheckpoint
from ferro_checkpoint.checkpointer.memory.memory_storage import MemoryStorage
from ferro_checkpoint.checkpointer.memory.neighbour import ring
from ferro_checkpoint.checkpointer.memory.reused_blocks import ReusedBlocks
from ferro_checkpoint.checkpointer.memory.search import _holders
from ferro_checkpoint.layout.record import RECORD_NAME, FileRecord


def test_neighbours_are_on_different_hosts_where_that_can_be():
    assert ring(["a"] * 3) == [0, 1, 2]
    assert ring(["a", "a", "b", "b"]) == [0, 2, 1, 3]
    assert ring(["a", "b", "b", "a", "c"]) == [0, 1, 4, 3, 2]


def test_ranges_are_read_across_their_borders_and_holes_are_found():
    content = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    held = HeldCheckpoint()
    for _ in range(2):  # the same memory serves the next checkpoint
        held.begin("step-000000001")
        for first, last in ((300, 400), (0, 100), (100, 300)):
            middle = (first + last) // 2
            held.write("model.safetensors", [content[first:middle].data, content[middle:last].data], first)
        held.hold_copy(
            [("model.safetensors", 600, 700), ("model.safetensors", 400, 500)],
            content[[*range(600, 700), *range(400, 500)]],
        )
        out = np.zeros(500, np.uint8)
        held.read_into("model.safetensors", [out[:7].data, out[7:350].data, out[350:].data], 0, "path")
        assert np.array_equal(out, content[:500])
        assert held.ranges("model.safetensors").tolist() == [[0, 100], [100, 300], [300, 400], [400, 500], [600, 700]]
        for begin, nbytes in ((450, 51), (500, 1), (699, 2), (999, 1)):
            with pytest.raises(CheckpointDamaged, match="does not hold byte"):
                held.read_into("model.safetensors", [bytearray_view(nbytes)], begin, "path")
    assert [block.nbytes for block in held.own.filled()] == [400]
    assert held.own.nbytes == 64 << 10


def bytearray_view(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


def test_the_readers_of_a_segment_are_all_that_hold_the_whole_of_it():
    record = FileRecord(100, (10, 50, 100), ("",) * 3)
    ranges = [np.array(one, np.int64).reshape(-1, 2) for one in ([[0, 10], [50, 100]], [[0, 30], [30, 60]], [])]
    assert _holders(record, ranges).tolist() == [[0, 1], [1, -1], [0, -1]]
    assert _holders(record, ranges[1:]) is None


def test_two_checkpoints_are_held_at_most_and_the_whole_one_stays():
    memory = MemoryStorage()
    for step in (1, 2, 3):
        name = f"step-{step:09}"
        directory = memory.new_directory(name, "token")
        directory.create("model.safetensors", 3)
        directory.open("model.safetensors", 3).write([bytearray_view(3)], 0)
        directory.commit(b"record %d" % step, overwrite=False)
        if step < 3:
            memory.agree_on(memory.other)
    assert memory.names() == ["step-000000002", "step-000000003"]
    assert memory.read_file("step-000000003", RECORD_NAME, 100) == b"record 3"
    memory.drop_others(memory.other)
    assert memory.names() == ["step-000000003"]
    memory.new_directory("step-000000004", "token").discard()
    assert memory.names() == ["step-000000003"]
    with pytest.raises(FileNotFoundError):
        memory.open_file("step-000000003", "optimizer.safetensors")
    memory.release()
    assert memory.nbytes == 0


def test_blocks_are_filled_again_and_those_that_are_too_small_go():
    blocks = ReusedBlocks()
    first = [blocks.allocate(20 << 20), blocks.allocate(20 << 20), blocks.allocate(5 << 20)]
    assert [block.nbytes >> 20 for block in blocks.filled()] == [20, 20, 5]
    blocks.reset()
    assert not blocks.filled()
    again = [blocks.allocate(20 << 20), blocks.allocate(20 << 20)]
    assert [np.shares_memory(*pair) for pair in zip(first, again, strict=False)] == [True, True]
    assert blocks.nbytes == (20 + 20 + 10) << 20
    blocks.reset()
    assert blocks.allocate(40 << 20).nbytes == blocks.nbytes == 40 << 20
