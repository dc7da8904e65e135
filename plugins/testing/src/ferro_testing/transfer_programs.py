"""Conformance of the order of transfers: random programs, compared with a model.

A program is a list of messages in an order in which it would end even if every send waited for its receive. A rank
issues its ends of them in this order, except that it may issue an asynchronous one earlier, before transfers on other
channels, and may join a send and a receive to a `sendrecv`. The model is: the k-th receive on a channel gets its k-th
message.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ferro import ProcessGroup, Work
from ferro.types import Array
from ferro_testing.case import Case
from ferro_testing.samples import Findings

_PROGRAMS = 40
_MESSAGES = 14
_TAGS = (0, 1, 5)
_SIZES = (0, 1, 3, 50, 2_000, 40_000)
_LARGE = 700_000  # of float64: more than backends send before the receive is posted
_COLLECTIVE = -1


@dataclass(slots=True)
class _End:
    """This rank's end of message number `time`, or a collective; `wait` is when it must have ended, at the latest."""

    time: int
    sends: bool = False
    peer: int = _COLLECTIVE
    tag: int = 0
    size: int = 0
    wait: int = 0  # equal to `time` when it blocks
    other: _End | None = None  # a receive that goes with this send in one sendrecv

    @property
    def channel(self) -> tuple[bool, int, int]:
        return self.sends, self.peer, self.tag


def check_transfer_programs(case: Case) -> None:
    """Transfers keep their places in both directions, blocking and asynchronous, with many tags."""
    if case.supports("send", "recv", "sendrecv", "tags"):
        for world_size in case.world_sizes:
            if world_size > 1:
                case.verify(run_programs, world_size)


def run_programs(group: ProcessGroup, seed: int = 0, programs: int = _PROGRAMS) -> list[str]:
    """Run random programs one after the other; return the mistakes."""
    found = Findings(group.rank)
    for number in range(programs):
        chance = random.Random(1000 * seed + number)  # noqa: S311 - the same on all ranks
        messages = list(_messages(chance, group.world_size, large=number % 10 == 0))
        own = random.Random(100_003 * seed + 1000 * number + group.rank)  # noqa: S311
        _run(group, _plan(own, messages, group.rank), f"program {number} of seed {seed}", found)
    return found.report()


def _messages(chance: random.Random, world_size: int, *, large: bool) -> Iterator[tuple[int, int, int, int]]:
    """Choose (source, target, tag, size) of each message; a collective has the source -1."""
    for time in range(_MESSAGES):
        if chance.random() < 0.05:
            yield _COLLECTIVE, 0, 0, 0
            continue
        source, target = chance.sample(range(world_size), 2)
        is_large = large and time == _MESSAGES // 2
        yield source, target, chance.choice(_TAGS), _LARGE if is_large else chance.choice(_SIZES)


def _plan(chance: random.Random, messages: list[tuple[int, int, int, int]], rank: int) -> list[_End]:
    """Order this rank's ends of the messages."""
    plan: list[_End] = []
    for time, (source, target, tag, size) in enumerate(messages):
        if source == _COLLECTIVE:
            plan.append(_End(time, wait=time))
        elif rank in (source, target):
            sends = rank == source
            wait = time if chance.random() < 0.3 else time + chance.randrange(1, _MESSAGES)
            end = _End(time, sends, target if sends else source, tag, size, wait)
            place = len(plan)
            while wait > time and place and chance.random() < 0.6 and plan[place - 1].channel != end.channel:
                place -= 1
            plan.insert(place, end)
    return list(_joined(chance, plan))


def _joined(chance: random.Random, plan: list[_End]) -> Iterator[_End]:
    """Join neighbours that are a send and a receive with one tag: if one may end later, or both come at one time."""
    position = 0
    while position < len(plan):
        end, after = plan[position], plan[position + 1] if position + 1 < len(plan) else None
        position += 1
        if after is None or _COLLECTIVE in (end.peer, after.peer) or after.tag != end.tag or after.sends == end.sends:
            yield end
        elif (after.wait > after.time or after.time == end.time + 1) and chance.random() < 0.7:
            position += 1
            send, receive = (end, after) if end.sends else (after, end)
            wait = end.time if after.wait == after.time else max(end.wait, after.wait)
            yield _End(end.time, True, send.peer, send.tag, send.size, wait, receive)
        else:
            yield end


def _run(group: ProcessGroup, plan: list[_End], what: str, found: Findings) -> None:
    """Carry out one rank's plan, then compare what it received."""
    outstanding: list[tuple[int, Work[object]]] = []
    received: list[tuple[_End, Array]] = []
    counts: dict[tuple[bool, int, int], int] = {}
    for end in plan:
        for wait, work in outstanding:
            if wait <= end.time == end.wait:  # only where this rank blocks anyhow, so that programs end
                work.wait()
        if end.peer == _COLLECTIVE:
            total = group.all_reduce(np.array(end.time))
            found.true(int(total) == end.time * group.world_size, f"{what}: all_reduce at {end.time} is {int(total)}")
            continue
        source = _message(end, counts, group.rank) if end.sends else None
        receive = end.other if end.sends else end
        buffer = np.empty(0) if receive is None else np.full(receive.size, -1.0)
        asynchronous = end.wait > end.time
        if source is None:
            work = group.recv(buffer, end.peer, end.tag, async_op=asynchronous)
        elif receive is None:
            work = group.send(source, end.peer, end.tag, async_op=asynchronous)
        else:
            work = group.sendrecv(source, buffer, end.peer, receive.peer, end.tag, async_op=asynchronous)
        if source is not None:
            source[...] = -2.0  # an input may be reused as soon as the call has returned
        if receive is not None:
            received.append((receive, buffer))
        if asynchronous:
            outstanding.append((end.wait, work))
    for _, work in outstanding:
        work.wait()
    for end, buffer in received:
        wanted = _message(end, counts, end.peer)
        found.same(
            buffer, wanted, f"{what}: message {end.time} from rank {end.peer}, tag {end.tag}, {end.size} numbers"
        )


def _message(end: _End, counts: dict[tuple[bool, int, int], int], source: int) -> Array:
    """Make the next message of a channel, which tells its source, tag and number."""
    number = counts[end.channel] = counts.get(end.channel, 0) + 1
    return np.full(end.size, source * 1e6 + end.tag * 1e4 + number)
