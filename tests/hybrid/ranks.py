"""Ranks of a hybrid group as threads, whose parts are two real gloos that count their calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ferro import Backend, BackendConfig, Device
from ferro_gloo.backend import GlooBackend
from ferro_hybrid import HybridBackend

from ..gloo.conftest import Ranks

COLLECTIVES = (
    "barrier",
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "gather",
    "scatter",
    "reduce_scatter",
    "all_to_all",
)
TRANSFERS = ("send", "recv", "exchange")


class CountingGloo(GlooBackend):
    """A gloo that counts what the group asks of it, by name."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked = Counter()


def _counted(name):
    method = getattr(GlooBackend, name)

    def ask(self, *args, **kwargs):
        self.asked[name] += 1
        return method(self, *args, **kwargs)

    return ask


for _name in (*COLLECTIVES, *TRANSFERS):
    setattr(CountingGloo, _name, _counted(_name))


def connect_two(config: BackendConfig) -> HybridBackend:
    """Connect two gloos, one for collectives and one for transfers."""
    first, second = (
        CountingGloo.connect(replace(config, store=config.store.prefix(name))) for name in ("collectives", "p2p")
    )
    return HybridBackend(collectives=first, p2p=second)


def start(world_size: int, function: Callable[..., object], connect: Callable[..., Backend] = connect_two) -> Ranks:
    """Run a function on every rank, in threads; return them when all have ended."""
    ranks = Ranks(world_size, connect=connect)
    ranks.start(function)
    ranks.join()
    return ranks


def run(
    world_size: int, function: Callable[..., object], connect: Callable[..., Backend] = connect_two
) -> list[object]:
    """Run a function on every rank, in threads; return the results by rank."""
    ranks = start(world_size, function, connect)
    for error in ranks.errors.values():
        raise error
    return [ranks.results[rank] for rank in range(world_size)]


class DeviceArray:
    """As much of an array on a GPU as a backend sees: not NumPy's, with dtype and size."""

    def __init__(self, values):
        self.host = np.asarray(values)
        self.dtype, self.size, self.nbytes = self.host.dtype, self.host.size, self.host.nbytes
        self.itemsize = self.host.itemsize


class Queued:
    """The end of what was launched on the queue of a device."""

    def __init__(self):
        self.waits = 0

    def done(self):
        return False

    def wait(self):
        self.waits += 1


class DeviceBackend(Backend):
    """Takes device arrays, on a queue; carries them over a CPU backend of its own.

    As NCCL's, it takes blocks of a scatter anywhere.
    """

    devices = (Device.CUDA,)
    streams = (Device.CUDA,)

    def __init__(self, below: Backend) -> None:
        super().__init__(below.rank, below.world_size, below.choice)
        self.below = below
        self.queued = Queued()
        self.asked = Counter()

    def agree(self, call, *, deadline):
        self.below.agree(call, deadline=deadline)

    def all_reduce(self, buffer, reduction, *, deadline):
        self.asked["all_reduce"] += 1
        self.below.all_reduce(buffer.host, reduction, deadline=deadline)

    def scatter(self, block, source, counts, root, *, deadline):
        self.asked["scatter"] += 1
        block, source = getattr(block, "host", block), getattr(source, "host", source)
        self.below.scatter(block, source, counts, root, deadline=deadline)

    def send(self, buffer, peer, *, tag, deadline):
        self.asked["send"] += 1
        self.below.send(buffer.host, peer, tag=tag, deadline=deadline)

    def recv(self, buffer, peer, *, tag, deadline):
        self.asked["recv"] += 1
        self.below.recv(buffer.host, peer, tag=tag, deadline=deadline)

    def exchange(self, sends, recvs, *, tag, deadline):
        self.asked["exchange"] += 1
        self.below.exchange(
            [(peer, buffer.host) for peer, buffer in sends],
            [(peer, buffer.host) for peer, buffer in recvs],
            tag=tag,
            deadline=deadline,
        )

    def launched(self):
        return self.queued

    def close(self):
        self.below.close()
