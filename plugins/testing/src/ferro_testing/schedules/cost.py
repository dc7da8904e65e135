"""Predict the time of an algorithm on a network by a model.

The model is LogGP (Alexandrov, Ionescu, Schauser & Scheiman 1995, "LogGP: incorporating long messages into the LogP
model"; LogP: Culler et al. 1993, "LogP: towards a realistic model of parallel computation"), with L = `latency_s`,
o = `overhead_s` and G = 1/bandwidth:

    1. A rank does its rounds in order. In a round its sends leave one after the other, each holding the rank's
       outgoing link for o + bytes·G.
    2. The first byte arrives L after it left. The rank receives messages one after the other, in the order of its
       receives, each holding its incoming link for bytes·G + o.
    3. The rank combines contributions one after the other, at `reduce_bytes_per_s`, while the next message may come in.
    4. The round ends when all sends, receives and combinations have ended.

This model differs from LogGP: the two links and the arithmetic work in parallel, where LogGP has one processor.
The gap g between short messages is taken to be o. Links inside the network are never shared, so ranks of one host do
not share its network card.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Generator, Sequence
from typing import NamedTuple, TypeAlias

from ferro.collectives import Build, Schedule
from ferro.collectives.network import Network
from ferro.errors import PluginError, UsageError


def cost_s(build: Build, world_size: int, nbytes: int, network: Network, root: int = 0) -> float:
    """Predict the seconds from the start, the same on all ranks, to the last rank's end.

    Schedules that differ between ranks only by a shift (a ring) are recognised by comparing a few ranks. One rank, or
    one host of ranks, is then run in place of all, so that thousands of ranks take milliseconds. Other schedules take
    some microseconds for each message.

    Args:
        build: a right algorithm, one that passes `check`.
        world_size: number of ranks.
        nbytes: bytes in all chunks of a rank's buffer together; all chunks are taken to be equal.
        network: the network model; its `hosts` must have an entry for every rank.
        root: the root; ignored if the collective has none.

    Raises:
        PluginError: the schedules wait for each other for ever.
        UsageError: world size, root, nbytes or hosts are out of range.
    """
    if world_size < 1 or not 0 <= root < world_size:
        raise UsageError(
            f"cost: world_size is {world_size} and root is {root}. "
            f"Give a world_size of at least 1 and a root from 0 to world_size - 1.",
            op="cost",
        )
    if nbytes < 0 or (network.hosts is not None and len(network.hosts) != world_size):
        raise UsageError(
            f"cost of {world_size} ranks: nbytes is {nbytes} and hosts is {network.hosts}. "
            f"Give nbytes of 0 or more, and one host for every rank."
        )
    simulation = _Simulation(_programs(build, world_size, root, network), world_size, nbytes, network)
    simulation.run()
    if simulation.waiting:
        source, offset = min(simulation.waiting)
        target = (source + offset) % world_size
        raise PluginError(
            f"cost by {getattr(build, '__name__', repr(build))} with {world_size} ranks, root {root}: rank {target} "
            f"waits for ever for rank {source}. Run ferro_testing.schedules.check on it.",
            op="cost",
            rank=target,
            peer=source,
        )
    return max(simulation.ends)


class _MessageEnd(NamedTuple):
    """One end of a message: the peer's distance in ranks, and the number of chunks moved."""

    offset: int
    chunks: int
    reduce: bool


class _Program(NamedTuple):
    """A schedule in which peers are distances, and chunks are only counted."""

    chunks: int
    rounds: tuple[tuple[tuple[_MessageEnd, ...], tuple[_MessageEnd, ...]], ...]


def _program(schedule: Schedule, rank: int, n: int) -> _Program:
    rounds = []
    for r in schedule.rounds:
        sends = tuple(_MessageEnd((send.peer - rank) % n, len(send.chunks), False) for send in r.sends)
        recvs = tuple(_MessageEnd((recv.peer - rank) % n, len(recv.chunks), recv.reduce) for recv in r.recvs)
        rounds.append((sends, recvs))
    return _Program(schedule.chunks, tuple(rounds))


def _programs(build: Build, n: int, root: int, network: Network) -> list[_Program]:
    """Make the programs of ranks 0 to p-1, where rank r's is that of rank r mod p; p is at most n."""
    period = _period(n, network.hosts)

    def program(rank: int) -> _Program:
        return _program(build(rank, n, root), rank, n)

    first = [program(rank) for rank in range(period)]
    later = {*range(period, min(2 * period, n)), n // 2, root, n - 1}.difference(range(period))
    if all(program(rank) == first[rank % period] for rank in later):
        return first
    return [*first, *map(program, range(period, n))]


def _period(n: int, hosts: Sequence[int] | None) -> int:
    """Find the least shift of ranks that leaves the network as it is; n if hosts are not equal blocks of ranks."""
    if hosts is None:
        return 1
    size = hosts.count(hosts[0])
    blocks = [hosts[start : start + size] for start in range(0, n, size)]
    alike = all(len(block) == size and len(set(block)) == 1 for block in blocks)
    return size if alike and len({block[0] for block in blocks}) == len(blocks) else n


_Channel: TypeAlias = tuple[int, int]
"""The source of messages, and the distance of their target in ranks."""


class _Simulation:
    """Runs programs against the network model; a program stands for every p-th rank.

    A rank is a generator that yields the channel it waits for, and goes on when a message is there.
    """

    def __init__(self, programs: Sequence[_Program], world_size: int, nbytes: int, network: Network) -> None:
        self._programs = programs
        self._world_size = world_size
        self._network = network
        self._chunk_bytes = nbytes / max(programs[0].chunks, 1)
        self._arrivals: defaultdict[_Channel, deque[float]] = defaultdict(deque)
        self.waiting: dict[_Channel, Generator[_Channel, None, None]] = {}
        self._ready = [self._rank(rank) for rank in range(len(programs))]
        self.ends: list[float] = []

    def run(self) -> None:
        """Let every rank run as far as it can, again and again, until all have ended or are waiting."""
        while self._ready:
            running = self._ready.pop()
            channel = next(running, None)
            if channel is not None:
                self.waiting[channel] = running

    def _rank(self, rank: int) -> Generator[_Channel, None, None]:
        """Go through the rounds of one rank; the numbers are those of the module's docstring."""
        n, now = self._world_size, 0.0
        for sends, recvs in self._programs[rank].rounds:
            incoming = arithmetic = now
            outgoing = self._send(rank, sends, now)  # 1
            for recv in recvs:  # 2
                source = (rank + recv.offset) % n
                channel = source % len(self._programs), -recv.offset % n  # that of the rank run in its place
                arrivals = self._arrivals[channel]
                if not arrivals:
                    yield channel
                _, bandwidth = self._network.link(source, rank)
                nbytes = recv.chunks * self._chunk_bytes
                incoming = max(incoming, arrivals.popleft())
                incoming += nbytes / bandwidth + self._network.overhead_s
                if recv.reduce:  # 3
                    arithmetic = max(arithmetic, incoming)
                    arithmetic += nbytes / self._network.reduce_bytes_per_s
            now = max(outgoing, incoming, arithmetic)  # 4
        self.ends.append(now)

    def _send(self, rank: int, sends: Sequence[_MessageEnd], now: float) -> float:
        """Record when each message's first byte arrives; return when the last message has left."""
        for send in sends:
            latency_s, bandwidth = self._network.link(rank, (rank + send.offset) % self._world_size)
            now += self._network.overhead_s
            channel = rank, send.offset
            self._arrivals[channel].append(now + latency_s)
            if channel in self.waiting:
                self._ready.append(self.waiting.pop(channel))
            now += send.chunks * self._chunk_bytes / bandwidth
        return now
