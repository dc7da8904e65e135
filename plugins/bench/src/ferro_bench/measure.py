"""The measurement of a case: contestants take turns, in an order that is reversed after each round.

    turn 0   [ferro] [torch-gloo] [openmpi]      not counted
    turn 1   [openmpi] [torch-gloo] [ferro]
    turn 2   [ferro] [torch-gloo] [openmpi]
    …

In a turn the ranks of one contestant write fresh numbers, enter their library's barrier, make a
warm-up call and then the timed calls, back to back, and check every result; all other ranks wait
in `recv`. A turn with a single long call has no warm-up call. The time of a call is that of its
slowest rank.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ferro_bench.contestants import Contestant
from ferro_bench.rank.case import IN_BLOCKS, BenchCase
from ferro_bench.rank.pattern import dtype_of
from ferro_bench.world import BenchWorld

Seconds: TypeAlias = "npt.NDArray[np.float64]"

_TURN_S = 120.0  # how long a turn, or the allocation of its buffers, may take
_TURN_BYTES = 8 << 20
_SMALL_BYTES = 4 << 10
_SMALL_CALLS = 60
_CALLS = 20
_FEWEST_TURNS = 4


@dataclass(frozen=True, slots=True)
class Measured:
    """The times of one contestant in one case.

    Attributes:
        seconds: of every timed call on its slowest rank, shape (turns, calls).
        wrong: number of wrong elements in the results of all ranks.
    """

    seconds: Seconds
    wrong: int


def make_case(
    collective: str,
    nbytes: int,
    world_size: int,
    *,
    dtype: str = "float32",
    op: str = "sum",
    calls: int | None = None,
    check: bool = True,
    async_op: bool = False,
    apart: bool = False,
) -> BenchCase:
    """Make the case of a size, rounded down to a multiple of what the ranks can cut, but not to 0.

    Args:
        collective: its name.
        nbytes: size of the whole buffer.
        world_size: number of ranks.
        dtype: name of the elements' dtype.
        op: the reduction's name.
        calls: timed calls in a turn; by size when None.
        check: compare every result.
        async_op: start each call asynchronously, then wait for it.
        apart: enter a barrier before each timed call.
    """
    step = world_size if collective in IN_BLOCKS else 1
    count = max(1, nbytes // dtype_of(dtype).itemsize // step) * step
    if collective == "barrier":
        count = 0
    if calls is None:
        calls = _SMALL_CALLS if nbytes <= _SMALL_BYTES else _CALLS
        calls = max(1, min(calls, _TURN_BYTES // nbytes))
    return BenchCase(
        collective=collective, count=count, dtype=dtype, op=op, calls=calls, check=check, async_op=async_op, apart=apart
    )


def default_rounds(nbytes: int) -> int:
    """Choose a number of turns that gives stable medians for a size without taking too long."""
    if nbytes <= 4 << 20:
        return 16
    return 10 if nbytes <= 64 << 20 else 5


def measure(
    worlds: Mapping[str, BenchWorld],
    case: BenchCase,
    contestants: Sequence[Contestant],
    rounds: int,
    limit_s: float | None = None,
) -> dict[str, Measured]:
    """Measure a case; return the times of each contestant, by its name.

    Args:
        worlds: the ranks of every library, by the world's name.
        case: the call.
        contestants: who makes it, in this order and its reverse.
        rounds: turns that count.
        limit_s: after this time there are no more turns, but for the first few, None for no limit.

    Raises:
        BackendError: a rank died or did not answer.
    """
    for contestant in contestants:
        order: dict[str, object] = {"do": "prepare", "case": asdict(case)}
        order |= {"slot": contestant.name, "memory": contestant.memory, "persistent": contestant.persistent}
        worlds[contestant.world].ask(order, _TURN_S)
    seconds: dict[str, list[Seconds]] = {contestant.name: [] for contestant in contestants}
    wrong = dict.fromkeys(seconds, 0)
    began = time.monotonic()
    for turn in range(rounds + 1):
        # It ends after an even number of turns, so that each contestant was first as often as last.
        late = limit_s is not None and time.monotonic() - began > limit_s
        if late and turn > _FEWEST_TURNS and turn % 2 == 1:
            break
        for contestant in contestants if turn % 2 == 0 else tuple(reversed(contestants)):
            order = {"do": "turn", "slot": contestant.name, "turn": turn}
            replies = worlds[contestant.world].ask(order, _TURN_S)
            wrong[contestant.name] += sum(reply["wrong"] for reply in replies)
            if turn > 0:
                seconds[contestant.name].append(_slowest(replies))
    for name in dict.fromkeys(contestant.world for contestant in contestants):
        worlds[name].ask({"do": "release"}, _TURN_S)
    return {name: Measured(np.array(rows), wrong[name]) for name, rows in seconds.items()}


def _slowest(replies: Sequence[Mapping[str, Any]]) -> Seconds:
    slowest: Seconds = np.max([reply["seconds"] for reply in replies], axis=0)
    return slowest
