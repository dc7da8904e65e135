"""ChunkedPlan refuses plans that leave an array or a slot, and arrays that are not the plan's."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from ferro_gloo.shm.native import ABSENT, NATIVE
from ferro_gloo.shm.region import RegionLayout

pytestmark = pytest.mark.skipif(NATIVE is None, reason=ABSENT)

SLOT = RegionLayout.of(1).slot_bytes
LENGTH = 4096
SIZE = 3 * LENGTH + 100


def ring():
    """Make the slots of a group of one rank, which is never late."""
    layout = RegionLayout.of(1)
    memory = memoryview(mmap.mmap(-1, layout.nbytes))
    return NATIVE.Ring(
        memory=memory,
        ranks=1,
        rank=0,
        headers_at=layout.headers_at,
        slots_at=layout.slots_at,
        slot_bytes=layout.slot_bytes,
        spins=0,
    )


def plan(**changed):
    arguments = {
        "ring": ring(),
        "stage": ((0, 0, SIZE, 0),),
        "own": (),
        "take": ((0, 0, SIZE, 0),),
        "reduction": None,
        "sizes": (SIZE, SIZE, -1, LENGTH, 4),
        "two_phase": False,
        "past_caches": False,
        "arena": (0, 0),
        "header": bytes(80),
    }
    return NATIVE.ChunkedPlan(**(arguments | changed))


def data(size=SIZE):
    return np.random.default_rng(size).integers(0, 255, size, np.uint8)


@pytest.mark.parametrize("past_caches", [True, False])
def test_moves_all_chunks_through_the_slots(past_caches):
    source, target = data(), np.zeros(SIZE, np.uint8)
    made = plan(past_caches=past_caches)
    for _ in range(3):
        target[...] = 0
        assert made.accepts(source, target)
        assert made.start(source, target) is None
        assert (target == source).all()


def test_copies_its_own_block():
    source, target = data(), np.zeros(SIZE, np.uint8)
    assert plan(take=(), own=((0, 0, SIZE, 0),)).start(source, target) is None
    assert (target == source).all()


@pytest.mark.parametrize("two_phase", [True, False])
def test_reduces(two_phase):
    source, target = data().view(np.float32), np.zeros(SIZE // 4, np.float32)
    take = ((0, 0, SIZE, 0),) if two_phase else ()
    made = plan(take=take, two_phase=two_phase, reduction=(0, 0, SIZE, (0,), "float32", "sum"))
    assert made.start(source, target) is None
    assert target.tobytes() == source.tobytes()


@pytest.mark.parametrize(
    "changed",
    [
        {"stage": ((0, 1, SIZE, 0),)},
        {"stage": ((SLOT - LENGTH + 1, 0, SIZE, 0),)},
        {"stage": ((0, 0, SIZE),)},
        {"stage": ((-2, 0, SIZE, 0),)},
        {"take": ((0, 0, SIZE, 1),)},
        {"take": ((0, SLOT - LENGTH + 1, SIZE, 0),)},
        {"take": ((1, 0, SIZE, 0),)},
        {"own": ((0, 0, SIZE + 1, 0),)},
        {"sizes": (SIZE, SIZE, -1, 0, 4)},
        {"sizes": (SIZE, SIZE, -1, LENGTH, 0)},
        {"sizes": (SIZE, SIZE, -1, LENGTH)},
        {"two_phase": True},
        {"header": bytes(8)},
        {"header": bytes(200)},
        {"reduction": (0, 0, SIZE, (0,), "float32", "plus")},
        {"reduction": (0, 0, SIZE, (0, 0), "float32", "sum")},
        {"reduction": (0, 0, SIZE, (SLOT,), "float32", "sum")},
        {"reduction": (0, 0, SIZE, (2,), "float32", "sum")},
        {"reduction": (4, 0, SIZE, (0,), "float32", "sum")},
        {"reduction": (0, -1, SIZE, (0,), "float32", "sum")},
    ],
    ids=str,
)
def test_refuses_plans_that_leave_their_memory(changed):
    with pytest.raises((ValueError, TypeError)):
        plan(**changed)


def test_refuses_other_arrays():
    made = plan()
    source, target = data(), np.zeros(SIZE, np.uint8)
    frozen = np.zeros(SIZE, np.uint8)
    frozen.flags.writeable = False
    whole = np.zeros(SIZE + 1, np.uint8)
    others = [(source, frozen), (source[1:], target), (source, whole), (whole[1:], whole[:-1]), (source, None)]
    for from_, to in [*others, (np.zeros(2 * SIZE, np.uint8)[::2], target)]:
        assert not made.accepts(from_, to)
        with pytest.raises((ValueError, TypeError, BufferError)):
            made.start(from_, to)
    with pytest.raises(ValueError, match="none of this operation"):
        made.resume(source, target, 100)
    made.yields = -1
    with pytest.raises(ValueError, match="spins and yields"):
        made.start(source, target)


def test_a_retracted_ring_accepts_nothing():
    slots = ring()
    made = plan(ring=slots)
    slots.retract()
    assert not made.accepts(data(), np.zeros(SIZE, np.uint8))
