"""An observer for tests that count operations."""

from __future__ import annotations


class OpNames:
    """Lists the names of rank 0's operations."""

    def __init__(self):
        self.ops = []

    def started(self, event):
        if event.rank == 0:
            self.ops.append(event.op)

    def finished(self, event):
        pass

    def close(self):
        pass
