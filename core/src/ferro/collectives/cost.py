"""The cost: how long an algorithm takes on a network, predicted by a model.

The model is LogGP (Alexandrov, Ionescu, Schauser & Scheiman 1995, "LogGP: incorporating long
messages into the LogP model"; LogP: Culler et al. 1993, "LogP: towards a realistic model of
parallel computation"), with L = `latency_s`, o = `overhead_s` and G = 1/bandwidth:

    1. A rank does its rounds in order. In a round its sends leave one after the other, each
       holding the rank's outgoing link for o + bytes·G.
    2. The first byte is there L after it left. The rank takes what comes one after the other, in
       the order of its receives, each holding its incoming link for bytes·G + o.
    3. What is to be combined is, one after the other, at `reduce_bytes_per_s`, while the next
       message may come in.
    4. The round ends when all has left, come and been combined.

Where ours differs: the two links and the arithmetic are busy side by side, where LogGP has one
processor; g, the gap between short messages, is taken to be o; links inside the network are
never shared, so ranks of one host do not share its network card.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ferro.collectives.messages import Subject
from ferro.collectives.schedule import Build, Schedule
from ferro.errors import UsageError


@dataclass(frozen=True, slots=True)
class Network:
    """What the cost model knows of a network.

    Attributes:
        latency_s: seconds from the first byte's leaving to its arrival.
        bandwidth_bytes_per_s: of each rank's link, each way.
        overhead_s: seconds of work for each message, on both of its ends.
        reduce_bytes_per_s: how fast a rank combines what it received.
        hosts: for each rank a number that says on which host it is; None: all are on one.
        inter_host_latency_s: `latency_s` between ranks of different hosts; None: the same.
        inter_host_bandwidth_bytes_per_s: the bandwidth between them; None: the same.

    Raises:
        UsageError: a time is negative, or a rate not above zero.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    overhead_s: float = 0.0
    reduce_bytes_per_s: float = math.inf
    hosts: tuple[int, ...] | None = None
    inter_host_latency_s: float | None = None
    inter_host_bandwidth_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        times = (self.latency_s, self.overhead_s, self.inter_host_latency_s or 0.0)
        rates = (
            self.bandwidth_bytes_per_s,
            self.reduce_bytes_per_s,
            self.bandwidth_bytes_per_s
            if self.inter_host_bandwidth_bytes_per_s is None
            else self.inter_host_bandwidth_bytes_per_s,
        )
        if not (all(time >= 0 for time in times) and all(rate > 0 for rate in rates)):
            raise UsageError(f"{self}: give times of 0 or more and rates above 0.")

    def link(self, source: int, target: int) -> tuple[float, float]:
        """Latency in seconds and bandwidth in bytes per second from one rank to another."""
        latency_s, bandwidth = self.latency_s, self.bandwidth_bytes_per_s
        if self.hosts is not None and self.hosts[source] != self.hosts[target]:
            if self.inter_host_latency_s is not None:
                latency_s = self.inter_host_latency_s
            if self.inter_host_bandwidth_bytes_per_s is not None:
                bandwidth = self.inter_host_bandwidth_bytes_per_s
        return latency_s, bandwidth


def cost_s(build: Build, world_size: int, nbytes: int, network: Network, root: int = 0) -> float:
    """Predict the seconds from the start, the same on all ranks, to the last rank's end.

    Schedules that are the same for every rank but for a shift (a ring) are recognised by
    comparing a few ranks, and run for one rank, or one host of ranks, in place of all: thousands
    of ranks take milliseconds. Others take some microseconds for each message.

    Args:
        build: a right algorithm: one that passes `check`.
        world_size: number of ranks.
        nbytes: bytes in all chunks of a rank's buffer together; all chunks are taken to be equal.
        network: the network model; its `hosts` must have an entry for every rank.
        root: the root, where there is one.

    Raises:
        PluginError: the schedules wait for each other for ever.
        UsageError: world size, root, nbytes or hosts make no sense.
    """
    subject = Subject("cost", build, world_size, root)
    if nbytes < 0 or (network.hosts is not None and len(network.hosts) != world_size):
        raise UsageError(
            f"cost of {world_size} ranks: nbytes is {nbytes} and hosts is {network.hosts}. "
            f"Give nbytes of 0 or more, and one host for every rank."
        )
    return _Clock(subject, _programs(subject, network), nbytes, network).last_end_s()


class _End(NamedTuple):
    """One end of a message: how many ranks on the peer is, and how much is moved."""

    offset: int
    chunks: int
    reduce: bool


class _Program(NamedTuple):
    """A schedule without the names of ranks and chunks."""

    chunks: int
    rounds: tuple[tuple[tuple[_End, ...], tuple[_End, ...]], ...]


def _program(schedule: Schedule, rank: int, n: int) -> _Program:
    return _Program(
        schedule.chunks,
        tuple(
            (
                tuple(_End((end.peer - rank) % n, len(end.chunks), False) for end in r.sends),
                tuple(_End((end.peer - rank) % n, len(end.chunks), end.reduce) for end in r.recvs),
            )
            for r in schedule.rounds
        ),
    )


def _programs(subject: Subject, network: Network) -> list[_Program]:
    """The programs of ranks 0 to p-1, where rank r's is that of rank r mod p; p is at most n."""
    n, root = subject.world_size, subject.root
    period = _period(n, network.hosts)

    def program(rank: int) -> _Program:
        return _program(subject.build(rank, n, root), rank, n)

    first = [program(rank) for rank in range(period)]
    later = {*range(period, min(2 * period, n)), n // 2, root, n - 1}.difference(range(period))
    if all(program(rank) == first[rank % period] for rank in later):
        return first
    return [*first, *map(program, range(period, n))]


def _period(n: int, hosts: Sequence[int] | None) -> int:
    """The least shift of ranks that leaves the network as it is, if hosts are equal blocks."""
    if hosts is None:
        return 1
    size = hosts.count(hosts[0])
    blocks = [hosts[start : start + size] for start in range(0, n, size)]
    alike = all(len(block) == size and len(set(block)) == 1 for block in blocks)
    return size if alike and len({block[0] for block in blocks}) == len(blocks) else n


_Channel: TypeAlias = tuple[int, int]
"""A source, and how many ranks on the target is."""


class _Clock:
    """Runs programs against the network model; a program stands for every p-th rank.

    A rank is a generator that gives the channel it waits for, and goes on when a message is there.
    """

    def __init__(self, subject: Subject, programs: Sequence[_Program], nbytes: int, network: Network) -> None:
        self._subject = subject
        self._programs = programs
        self._network = network
        self._chunk_bytes = nbytes / max(programs[0].chunks, 1)
        self._arrivals: defaultdict[_Channel, deque[float]] = defaultdict(deque)
        self._waiting: dict[_Channel, Generator[_Channel, None, None]] = {}
        self._ready = [self._rank(rank) for rank in range(len(programs))]
        self._ends: list[float] = []

    def last_end_s(self) -> float:
        """Let every rank run as far as it can, again and again, until the last one ends."""
        while self._ready:
            running = self._ready.pop()
            channel = next(running, None)
            if channel is not None:
                self._waiting[channel] = running
        if self._waiting:
            source, offset = min(self._waiting)
            target = (source + offset) % self._subject.world_size
            raise self._subject.error(
                f"waits for ever for rank {source}. Run ferro.collectives.checker on it.", rank=target, peer=source
            )
        return max(self._ends)

    def _rank(self, rank: int) -> Generator[_Channel, None, None]:
        """Go through the rounds of one rank; the numbers are those of the module's docstring."""
        now = 0.0
        for sends, recvs in self._programs[rank].rounds:
            incoming = arithmetic = now
            outgoing = self._send(rank, sends, now)  # 1
            for recv in recvs:  # 2
                source, channel = self._channel_of(rank, recv)
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
        self._ends.append(now)

    def _send(self, rank: int, sends: Sequence[_End], now: float) -> float:
        """Post when each message's first byte arrives; return when the last one has left."""
        n = self._subject.world_size
        for send in sends:
            latency_s, bandwidth = self._network.link(rank, (rank + send.offset) % n)
            now += self._network.overhead_s
            channel = rank, send.offset
            self._arrivals[channel].append(now + latency_s)
            if channel in self._waiting:
                self._ready.append(self._waiting.pop(channel))
            now += send.chunks * self._chunk_bytes / bandwidth
        return now

    def _channel_of(self, rank: int, recv: _End) -> tuple[int, _Channel]:
        """The source of a message, and the channel it comes by: that of the rank it is run as."""
        n = self._subject.world_size
        source = (rank + recv.offset) % n
        return source, (source % len(self._programs), -recv.offset % n)
