"""The libraries that are measured, each as prepared calls on given memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from pattern import Floats

import ferro

Operation = Callable[[], object]


class Peer(Protocol):
    """A library with its process group open."""

    name: str

    def operation(self, collective: str, source: Floats, target: Floats) -> Operation:
        """Return a call that moves `source` into `target`; preparing it is not timed.

        For all_reduce and broadcast both are the same memory. The root is rank 0.
        """

    def close(self) -> None:
        """Leave the group."""


class FerroPeer:
    """ferro, over the backend that its group was opened with."""

    name = "ferro"

    def __init__(self, group: ferro.ProcessGroup) -> None:
        self._group = group

    def operation(self, collective: str, source: Floats, target: Floats) -> Operation:
        """See `Peer`."""
        methods = {
            "all_reduce": self._group.all_reduce,
            "broadcast": self._group.broadcast,
            "all_gather": self._group.all_gather,
            "reduce_scatter": self._group.reduce_scatter,
        }
        return partial(methods[collective], source, out=target)

    def close(self) -> None:
        """Do nothing: the group is the worker's."""


class TorchPeer:
    """torch.distributed over gloo, in the same processes, one thread for arithmetic."""

    name = "torch"

    def __init__(self) -> None:
        import torch
        import torch.distributed

        torch.set_num_threads(1)
        self._tensor = torch.from_numpy
        self._dist = torch.distributed
        self._dist.init_process_group("gloo")

    def operation(self, collective: str, source: Floats, target: Floats) -> Operation:
        """See `Peer`."""
        dist, given, result = self._dist, self._tensor(source), self._tensor(target)
        if collective == "all_reduce":
            return partial(dist.all_reduce, result)
        if collective == "broadcast":
            return partial(dist.broadcast, result, src=0)
        if collective == "all_gather":
            return partial(dist.all_gather_single, result, given)
        return partial(dist.reduce_scatter_single, result, given)

    def close(self) -> None:
        """See `Peer`."""
        self._dist.destroy_process_group()
