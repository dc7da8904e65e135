"""Algorithms as data: a schedule is one rank's rounds of sends and receives, as plain values.

An algorithm is a pure function `build(rank, world_size, root) -> Schedule`. The buffer that a collective works on is
cut into numbered chunks (`Schedule.chunks` of them). A schedule lists, for one rank, the chunks that go to and come
from each peer, round by round. It holds no array and moves no byte: the executor, the checker, the cost and the drawing
all read the same value.

The meaning of a round
    1. Everything in a round happens at the same time: sends read the chunks as they were when the round began.
    2. A message is `Send(peer, chunks)` on one rank and `Recv(peer, chunks, …)` with the same chunks, in the same
       order, on the other. Messages between two ranks arrive in the order of their rounds.
    3. `Recv(reduce=False)` overwrites the chunks.
    4. `Recv(reduce=True)` combines. When a chunk is received from several peers in one round, or is combined with the
       value that this rank already holds, the operands are taken in order of rank, this rank's own at its place:
       ((x_a op x_b) op x_c) with a < b < c. So an algorithm in which every chunk is reduced from single contributions
       gives rank-order results.

The chunks of each collective, at the start and at the end
    all_reduce      any number of chunks; all ranks hold a contribution; all hold the reduction
    reduce          the same; the root holds the reduction
    broadcast       any number of chunks; the root holds them; all hold them
    all_gather      chunk i is rank i's block; rank i holds it; all hold all
    gather          chunk i is rank i's block; rank i holds it; the root holds all
    scatter         chunk i is rank i's block; the root holds all; rank i holds chunk i
    reduce_scatter  all ranks hold a contribution to every chunk; rank i holds chunk i reduced
    all_to_all      chunk i*n + j goes from rank i to rank j; rank i holds row i; then column i
    barrier         no chunks: every rank ends knowing (through messages) that every other began
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Send:
    """Send these chunks to `peer`, in this order."""

    peer: int
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recv:
    """Receive these chunks from `peer`, in this order; combine them when `reduce`."""

    peer: int
    chunks: tuple[int, ...]
    reduce: bool = False


@dataclass(frozen=True, slots=True)
class Round:
    """The transfers that one rank does at the same time."""

    sends: tuple[Send, ...] = ()
    recvs: tuple[Recv, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """One rank's rounds in a collective, over `chunks` chunks."""

    chunks: int
    rounds: tuple[Round, ...]


Build: TypeAlias = Callable[[int, int, int], Schedule]
"""An algorithm: a pure function (rank, world_size, root) -> Schedule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveInfo:
    """An algorithm that a plugin offers.

    Attributes:
        collective: the collective that it carries out: "all_reduce", "broadcast", … (see `ferro.collectives.schedule`).
        algorithm: its name, unique for the collective.
        build: pure function (rank, world_size, root) -> Schedule.
        combines_once: True when every reduced chunk is made in one round from the contributions of all ranks, and so in
            order of rank and with a single rounding.
        summary: one line for people.
    """

    collective: str
    algorithm: str
    build: Build
    combines_once: bool = False
    summary: str = ""
