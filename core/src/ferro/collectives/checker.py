"""The checker: proves an algorithm right for a world size, without moving a byte.

All ranks' schedules are run on symbols: a chunk's value says whose contributions it holds, and in
which order they were combined. Ranks' own arithmetic is not checked: that is the executor's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ferro.collectives.contract import CONTRACTS, Contract
from ferro.collectives.messages import Subject, pair
from ferro.collectives.schedule import Build, Schedule, Send
from ferro.collectives.symbolic import SymbolicRun
from ferro.errors import UsageError


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proved, beyond that the algorithm is right.

    Attributes:
        rank_order: every result is (((x_0 op x_1) op x_2) … op x_(n-1)), so that it is that of
            reducing in rank order bit for bit; True where nothing is reduced.
        combines_once: every result is made in one round from all single contributions, and so
            in rank order and with a single rounding; True where nothing is reduced.
        same_everywhere: ranks that end with the same chunk combined it alike, so that their
            copies are equal bit for bit; True where nothing is reduced.
        rounds: the most rounds on a rank.
        messages: the most messages that a rank sends.
        chunks_sent: the most chunks that a rank sends.
    """

    rank_order: bool
    combines_once: bool
    same_everywhere: bool
    rounds: int
    messages: int
    chunks_sent: int


def check(collective: str, build: Build, world_size: int, root: int = 0) -> Proof:
    """Prove that `build` is a right algorithm for `collective` with this world size and root.

    Proved is: every send has its receive, with the same chunks in the same order; no rank waits
    for ever (a round ends when its receives have arrived, sends never block); no rank sends or
    combines a chunk that it does not hold; no chunk is overwritten twice, or overwritten and
    combined, in one round; every rank ends with every contribution exactly once where `schedule`
    says it must; after a barrier every rank has heard, through messages, of every other.

    Args:
        collective: its name, such as "all_reduce".
        build: the algorithm, called for every rank as `build(rank, world_size, root)`.
        world_size: number of ranks, at least 1.
        root: the root; of no meaning where the collective has none.

    Raises:
        PluginError: the algorithm is wrong; names collective, world size, rank and round.
        UsageError: there is no such collective, world size or root.
    """
    if collective not in CONTRACTS:
        raise UsageError(f"there is no collective {collective!r} to check; choose one of {', '.join(CONTRACTS)}.")
    subject = Subject(collective, build, world_size, root)
    contract = CONTRACTS[collective]
    schedules = subject.schedules()
    _check_chunks(subject, contract, schedules[0].chunks)
    messages = pair(subject, schedules)
    run = SymbolicRun(subject, contract, schedules, messages)
    run.to_the_end()
    results = run.results()
    in_order = tuple(range(world_size))
    return Proof(
        rank_order=not contract.reduces or all(term.order == in_order for terms in results for term in terms),
        combines_once=all(term.at_once for terms in results for term in terms),
        same_everywhere=all(term.number == terms[0].number for terms in results for term in terms),
        rounds=max(len(schedule.rounds) for schedule in schedules),
        messages=max(sum(1 for _ in _sends(schedule)) for schedule in schedules),
        chunks_sent=max(sum(len(send.chunks) for send in _sends(s)) for s in schedules),
    )


def _sends(schedule: Schedule) -> Iterator[Send]:
    return (send for current in schedule.rounds for send in current.sends)


def _check_chunks(subject: Subject, contract: Contract, chunks: int) -> None:
    if contract.chunks is None:
        wanted, right = "at least 1", chunks >= 1
    else:
        count = contract.chunks(subject.world_size)
        wanted, right = str(count), chunks == count
    if not right:
        raise subject.error(
            f"has {chunks} chunks; {subject.op} needs {wanted}. See the table in ferro.collectives.schedule.", rank=0
        )
