"""Steps of an exchange in one process: they refuse memory that does not fit, and never overwrite what was not read."""

from __future__ import annotations

import numpy as np
import pytest

from ferro_gloo.shm.exchange.native_steps import NATIVE_STEPS
from ferro_gloo.shm.exchange.plain_steps import PlainSteps


def aligned(nbytes):
    memory = np.zeros(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes]


BELL, CHANNEL, USER = aligned(64), aligned(1024), np.zeros(8, np.uint8)
FROZEN = np.zeros(8, np.uint8)
FROZEN.setflags(write=False)


@pytest.mark.skipif(NATIVE_STEPS is None, reason="the native steps are not built")
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((BELL, [], []), TypeError),
        ((BELL, (), [], 0, 0), TypeError),
        ((BELL, [], [], -1, 0), ValueError),
        ((BELL, [], [], 0, 10**8), ValueError),
        ((BELL[:32], [], [], 0, 0), ValueError),
        ((FROZEN, [], [], 0, 0), (BufferError, ValueError)),
        ((BELL, [USER], [], 0, 0), ValueError),
        ((BELL, [(USER, CHANNEL, BELL, 8)], [], 0, 0), TypeError),
        ((BELL, [(USER, CHANNEL, BELL, 8, 3, None)], [], 0, 0), ValueError),
        ((BELL, [(USER, CHANNEL, BELL, 8, 1, None)], [], 0, 0), ValueError),
        ((BELL, [(USER, CHANNEL, BELL, 8, 8, None)], [], 0, 0), ValueError),
        ((BELL, [(USER, CHANNEL, BELL, 0, 2, None)], [], 0, 0), ValueError),
        ((BELL, [(USER, CHANNEL, BELL, 2**62, 2, None)], [], 0, 0), ValueError),
        ((BELL, [(USER, CHANNEL, BELL, 1000, 2, None)], [], 0, 0), ValueError),
        ((BELL, [(USER, CHANNEL[8:], BELL, 8, 2, None)], [], 0, 0), ValueError),
        ((BELL, [(USER, CHANNEL[:100], BELL, 8, 2, None)], [], 0, 0), ValueError),
        ((BELL, [(USER, CHANNEL, BELL[:8], 8, 2, None)], [], 0, 0), ValueError),
        ((BELL, [], [(FROZEN, CHANNEL, BELL, 8, 2, None)], 0, 0), (BufferError, ValueError)),
        ((BELL, [], [(USER, CHANNEL, BELL, 8, 2, USER[:7])], 0, 0), ValueError),
        ((BELL, [], [(USER, CHANNEL, BELL, 7, 2, USER)], 0, 0), ValueError),
    ],
)
def test_native_steps_refuse_memory_that_does_not_fit(arguments, error):
    with pytest.raises(error):
        NATIVE_STEPS(*arguments)


@pytest.mark.parametrize("make", [NATIVE_STEPS, PlainSteps], ids=["native", "pure Python"])
def test_steps_of_one_process(make):
    """One channel, both of whose ends are here: the sender may be four steps ahead, and no more."""
    if make is None:
        pytest.skip("the native steps are not built")
    out, got, channel, bell = np.zeros(8, np.uint8), np.zeros(8, np.uint8), aligned(1024), aligned(64)
    sender = make(bell, [(out, channel, bell, 8, 4, None)], [], 0, 0)
    receiver = make(bell, [], [(got, channel, bell, 8, 4, None)], 0, 0)
    for count in range(4):
        out[...] = count
        assert sender.begin()
    out[...] = 4
    assert not sender.begin()
    assert sender.awaited() == [0]
    with pytest.raises(ValueError, match="under way"):
        sender.begin()
    assert not sender.wait(0, 0, 0.01)
    for count in range(4):
        assert receiver()
        assert (got == count).all()
    assert sender.progress()
    assert receiver.begin()
    assert (got == 4).all()
    assert not receiver()
    assert receiver.awaited() == [0]
    receiver.close(True)
    assert channel.view(np.int64)[1] == 1
    for steps in (sender, receiver):
        steps.close(False)
        with pytest.raises(ValueError, match="closed"):
            steps.begin()
