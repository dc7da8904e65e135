"""The checker proves an algorithm right for a world size, without moving a byte.

It runs all ranks' schedules on symbols: the value of a chunk records which ranks' contributions it
contains, and the order in which they were combined. The arithmetic itself is not checked.
"""

from __future__ import annotations

from dataclasses import dataclass

from ferro.collectives import Build, Send
from ferro.errors import UsageError
from ferro_testing.schedules.messages import AlgorithmInstance, match_messages
from ferro_testing.schedules.symbolic import CONTRACTS, Contract, SymbolicRun


@dataclass(frozen=True, slots=True)
class Proof:
    """The properties of an algorithm that was proved right.

    Attributes:
        rank_order: every result is (((x_0 op x_1) op x_2) … op x_(n-1)), the same bits as reducing
            in rank order; True where nothing is reduced.
        combines_once: every result is made in one round from the contributions of single ranks,
            and so in rank order and with a single rounding; True where nothing is reduced.
        same_everywhere: ranks that end with the same chunk combined it in the same way, so that their copies
            are equal bit for bit; True where nothing is reduced.
        rounds: the largest number of rounds of a rank.
        messages: the largest number of messages that a rank sends.
        chunks_sent: the largest number of chunks that a rank sends.
    """

    rank_order: bool
    combines_once: bool
    same_everywhere: bool
    rounds: int
    messages: int
    chunks_sent: int


def check(collective: str, build: Build, world_size: int, root: int = 0) -> Proof:
    """Prove that `build` is a right algorithm for `collective` with this world size and root.

    The proof covers the following. Every send has its receive, with the same chunks in the same
    order. No rank waits for ever (a round ends when its receives have arrived; sends never block).
    No rank sends or combines a chunk that it does not hold. No chunk is overwritten twice, or
    overwritten and combined, in one round. Every rank ends with every contribution exactly once
    where the table in `ferro.collectives.schedule` requires it. After a barrier every rank has
    heard, through messages, of every other.

    Args:
        collective: its name, such as "all_reduce".
        build: the algorithm, called for every rank as `build(rank, world_size, root)`.
        world_size: number of ranks, at least 1.
        root: the root; ignored if the collective has none.

    Raises:
        PluginError: the algorithm is wrong; names collective, world size, rank and round.
        UsageError: there is no such collective, world size or root.
    """
    if collective not in CONTRACTS:
        raise UsageError(f"there is no collective {collective!r} to check; choose one of {', '.join(CONTRACTS)}.")
    instance = AlgorithmInstance(collective, build, world_size, root)
    contract = CONTRACTS[collective]
    schedules = instance.schedules()
    _check_chunks(instance, contract, schedules[0].chunks)
    run = SymbolicRun(instance, contract, schedules, match_messages(instance, schedules))
    run.run()
    results = run.results()
    sends: list[list[Send]] = [[send for one in schedule.rounds for send in one.sends] for schedule in schedules]
    in_order = tuple(range(world_size))
    return Proof(
        rank_order=not contract.reduces or all(value.order == in_order for values in results for value in values),
        combines_once=all(value.combined_once for values in results for value in values),
        same_everywhere=all(value.number == values[0].number for values in results for value in values),
        rounds=max(len(schedule.rounds) for schedule in schedules),
        messages=max(map(len, sends)),
        chunks_sent=max(sum(len(send.chunks) for send in own) for own in sends),
    )


def _check_chunks(instance: AlgorithmInstance, contract: Contract, chunks: int) -> None:
    if contract.chunks is None:
        wanted, right = "at least 1", chunks >= 1
    else:
        count = contract.chunks(instance.world_size)
        wanted, right = str(count), chunks == count
    if not right:
        raise instance.error(
            f"has {chunks} chunks; {instance.op} needs {wanted}. See the table in ferro.collectives.schedule.", rank=0
        )
