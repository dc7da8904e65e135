"""Ranks that give up: either all ranks go on with a call, or none does."""

from __future__ import annotations

import mmap
import random
import threading
import time

import pytest

from ferro import GroupClosed
from ferro.collectives.label import Call
from ferro_mpi.agreement import SharedMemoryAgreement
from ferro_mpi.shared_memory import GroupMemory

JOIN_S = 60.0


class Monitor:
    """A stand-in for the monitor, which knows deadlines only."""

    spins = 20
    yield_core = staticmethod(lambda: time.sleep(0))

    def check(self, deadline, awaited):
        if time.monotonic() > deadline:
            raise TimeoutError

    def progress(self):
        return False


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_go_on_or_none_when_some_come_at_the_others_deadline(world_size):
    for trial in range(60):
        memory = mmap.mmap(-1, 1 << 20)
        rng, went_on, began = random.Random(trial), [None] * world_size, threading.Barrier(world_size)

        def come(rank, arrival_s, memory=memory, went_on=went_on, began=began):
            agreement = SharedMemoryAgreement(GroupMemory(memory, rank, world_size), Monitor(), rank, world_size)
            began.wait(JOIN_S)
            time.sleep(arrival_s)
            try:
                agreement.agree(Call("barrier"), time.monotonic() + 0.004)
                went_on[rank] = True
            except (TimeoutError, GroupClosed):
                went_on[rank] = False

        arrivals = [rng.uniform(0, 0.006) for _ in range(world_size)]
        threads = [threading.Thread(target=come, args=(rank, arrivals[rank])) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(JOIN_S)
        assert went_on in ([True] * world_size, [False] * world_size), (trial, arrivals)
