"""Data, simulated ranks and an observer for the tests of tensor-parallel layers."""

from collections import Counter

import numpy as np
import pytest

import ferro

F64 = np.float64
SECONDS = 20.0
RANKS = pytest.mark.parametrize("ranks", [1, 2, 3])


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def simulate(run, ranks, **options):
    return ferro.simulate(run, ranks, timeout_s=SECONDS, **options)


class Traffic:
    """Counts the operations of rank 0, with their largest size; takes part as an observer."""

    def __init__(self):
        self.counts, self.largest = Counter(), 0

    def started(self, event):
        if event.rank == 0:
            self.counts[event.op] += 1
            self.largest = max(self.largest, event.nbytes)

    def finished(self, event):
        pass

    def close(self):
        pass

    def restart(self):
        self.counts, self.largest = Counter(), 0
