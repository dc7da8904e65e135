"""Run a collective on symbols in place of bytes, and compare the result with the collective's contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ferro.collectives import Schedule
from ferro.errors import PluginError
from ferro_testing.schedules.messages import AlgorithmInstance, Message

Holding: TypeAlias = Callable[[int, int, int, int], range]
"""(rank, world_size, root, chunks) -> the chunks that a rank holds, at the start or at the end."""


@dataclass(frozen=True, slots=True)
class Contract:
    """The state of a collective before and after: a line of the table in `ferro.collectives.schedule`.

    Attributes:
        reduces: whether the ranks' chunks are contributions to be combined.
        start: the chunks that a rank holds when the collective begins.
        end: the chunks that a rank must hold, complete, when it ends.
        chunks: the number of chunks of a schedule, given the world size; None: any number from 1 on.
    """

    reduces: bool
    start: Holding
    end: Holding
    chunks: Callable[[int], int] | None = None


def _all(rank: int, world_size: int, root: int, chunks: int) -> range:
    return range(chunks)


def _all_at_root(rank: int, world_size: int, root: int, chunks: int) -> range:
    return range(chunks) if rank == root else range(0)


def _own(rank: int, world_size: int, root: int, chunks: int) -> range:
    return range(rank, rank + 1)


def _row(rank: int, world_size: int, root: int, chunks: int) -> range:
    return range(rank * world_size, (rank + 1) * world_size)


def _column(rank: int, world_size: int, root: int, chunks: int) -> range:
    return range(rank, world_size * world_size, world_size)


CONTRACTS = {
    "all_reduce": Contract(True, _all, _all),
    "reduce": Contract(True, _all, _all_at_root),
    "broadcast": Contract(False, _all_at_root, _all),
    "all_gather": Contract(False, _own, _all, lambda n: n),
    "gather": Contract(False, _own, _all_at_root, lambda n: n),
    "scatter": Contract(False, _all_at_root, _own, lambda n: n),
    "reduce_scatter": Contract(True, _all, _own, lambda n: n),
    "all_to_all": Contract(False, _row, _column, lambda n: n * n),
    "barrier": Contract(False, _all, _all, lambda n: 0),
}


class SymbolicValue(NamedTuple):
    """The content of a chunk: contributions of ranks, combined in a certain order.

    Attributes:
        ranks: bit r is set when the contribution of rank r is in it.
        number: two values of one run have the same number when they were combined in the
            same way; the number of a single contribution is its rank.
        order: the ranks, where the value is (((x_a op x_b) op x_c) …); None where it is bracketed
            in another way.
        combined_once: all contributions were combined in one round.
    """

    ranks: int
    number: int
    order: tuple[int, ...] | None
    combined_once: bool


class SymbolicRun:
    """All ranks of one collective, each going through its rounds as messages allow."""

    def __init__(
        self,
        instance: AlgorithmInstance,
        contract: Contract,
        schedules: Sequence[Schedule],
        messages: Sequence[Message],
    ) -> None:
        n = instance.world_size
        self._instance = instance
        self._contract = contract
        self._chunks = schedules[0].chunks
        self._rounds = [len(schedule.rounds) for schedule in schedules]
        self._outbox: list[list[list[Message]]] = [[[] for _ in s.rounds] for s in schedules]
        self._inbox: list[list[list[Message]]] = [[[] for _ in s.rounds] for s in schedules]
        for message in messages:
            self._outbox[message.source][message.sent_in].append(message)
            self._inbox[message.target][message.received_in].append(message)
        # For each rank and round: the number of messages due in it that are not sent yet.
        self._unsent = [[len(inbox) for inbox in inboxes] for inboxes in self._inbox]
        # The content of each message in flight: the ranks that its sender had heard of, and its chunks.
        self._payloads: dict[Message, tuple[int, list[SymbolicValue]]] = {}
        # The round that each rank is in, and the ranks whose round can end.
        self._at = [-1] * n
        self._ready: list[int] = []
        self._heard = [1 << rank for rank in range(n)]
        self._held = [
            {
                chunk: SymbolicValue(1 << rank, rank, (rank,), combined_once=True)
                for chunk in contract.start(rank, n, instance.root, self._chunks)
            }
            for rank in range(n)
        ]
        self._numbers: dict[tuple[int, ...], int] = {}

    def run(self) -> None:
        """Let every rank go through all its rounds.

        Raises:
            PluginError: ranks wait for each other, or a rank sends or combines chunks wrongly.
        """
        for rank in range(self._instance.world_size):
            self._enter(rank, 0)
        while self._ready:
            rank = self._ready.pop()
            self._receive(rank, self._at[rank])
            self._enter(rank, self._at[rank] + 1)
        for rank, reached in enumerate(self._at):
            if reached < self._rounds[rank]:
                self._raise_deadlock(rank)

    def results(self) -> list[list[SymbolicValue]]:
        """List, for each chunk, its values on the ranks that must hold it at the end.

        Raises:
            PluginError: a rank that must hold a chunk does not, or not completely; or, in a
                barrier, a rank ends before it has heard of all others.
        """
        n, root = self._instance.world_size, self._instance.root
        everyone = (1 << n) - 1
        results: list[list[SymbolicValue]] = [[] for _ in range(self._chunks)]
        for rank, held in enumerate(self._held):
            for chunk in self._contract.end(rank, n, root, self._chunks):
                value = held.get(chunk)
                if value is None:
                    raise self._error(f"ends without chunk {chunk}. Send it there.", rank)
                if self._contract.reduces and value.ranks != everyone:
                    raise self._error(
                        f"ends with chunk {chunk} lacking the contributions of ranks "
                        f"{_ranks(everyone & ~value.ranks)}. Send them there, with reduce.",
                        rank,
                    )
                results[chunk].append(value)
        if self._chunks == 0:
            self._check_heard(everyone)
        return results

    def _enter(self, rank: int, index: int) -> None:
        """Begin a round: send its messages; a receiver that waited only for these can end its round."""
        self._at[rank] = index
        if index == self._rounds[rank]:
            return
        held = self._held[rank]
        for message in self._outbox[rank][index]:
            for chunk in message.chunks:
                if chunk not in held:
                    raise self._error(
                        f"sends chunk {chunk} to rank {message.target}, but does not hold it yet. "
                        f"Receive it in an earlier round.",
                        rank,
                        index,
                        message.target,
                    )
            self._payloads[message] = self._heard[rank], [held[chunk] for chunk in message.chunks]
            unsent = self._unsent[message.target]
            unsent[message.received_in] -= 1
            if not unsent[message.received_in] and self._at[message.target] == message.received_in:
                self._ready.append(message.target)
        if not self._unsent[rank][index]:
            self._ready.append(rank)

    def _receive(self, rank: int, index: int) -> None:
        """End a round, all of whose messages have arrived: overwrite and combine chunks."""
        overwritten: dict[int, SymbolicValue] = {}
        combined: dict[int, list[tuple[int, SymbolicValue]]] = {}
        for message in self._inbox[rank][index]:
            heard, values = self._payloads.pop(message)
            self._heard[rank] |= heard
            for chunk, value in zip(message.chunks, values, strict=True):
                if message.reduce:
                    combined.setdefault(chunk, []).append((message.source, value))
                elif chunk in overwritten:
                    raise self._error(
                        f"overwrites chunk {chunk} twice in one round. Receive it once, or with reduce.",
                        rank,
                        index,
                        message.source,
                    )
                else:
                    overwritten[chunk] = value
        held = self._held[rank]
        for chunk, operands in combined.items():
            if chunk in overwritten:
                raise self._error(
                    f"both overwrites and combines chunk {chunk} in one round. Use two rounds.", rank, index
                )
            if chunk not in held:
                raise self._error(
                    f"combines into chunk {chunk}, but does not hold it yet. Overwrite it first.", rank, index
                )
            operands.append((rank, held[chunk]))
            held[chunk] = self._combine(rank, index, chunk, operands)
        held.update(overwritten)

    def _combine(self, rank: int, index: int, chunk: int, operands: list[tuple[int, SymbolicValue]]) -> SymbolicValue:
        """Combine the operands, each with the rank that it came from, in order of rank."""
        n = self._instance.world_size
        operands.sort()
        values = [value for _, value in operands]
        ranks = 0
        for peer, value in operands:
            if ranks & value.ranks:
                raise self._error(
                    f"combines chunk {chunk} with the contributions of ranks "
                    f"{_ranks(ranks & value.ranks)} twice. Let each arrive once.",
                    rank,
                    index,
                    None if peer == rank else peer,
                )
            ranks |= value.ranks
        numbers = tuple(value.number for value in values)
        return SymbolicValue(
            ranks,
            self._numbers.setdefault(numbers, n + len(self._numbers)),
            _order(values),
            combined_once=all(number < n for number in numbers),
        )

    def _check_heard(self, everyone: int) -> None:
        for rank, heard in enumerate(self._heard):
            if heard != everyone:
                raise self._error(
                    f"ends before it has heard, even through others, of ranks "
                    f"{_ranks(everyone & ~heard)}. Let their messages reach it.",
                    rank,
                )

    def _raise_deadlock(self, rank: int) -> None:
        """Follow the chain of ranks that wait for each other to its cycle, and raise an error that names it."""
        path = [rank]
        while True:
            index = self._at[path[-1]]
            source = next(message.source for message in self._inbox[path[-1]][index] if message not in self._payloads)
            if source in path:
                break
            path.append(source)
        cycle = path[path.index(source) :]
        waits = " waits for ".join(f"rank {r} (round {self._at[r] + 1})" for r in [*cycle, source])
        raise self._error(
            f"never ends: {waits}. Let one of them send in an earlier round.",
            source,
            self._at[source],
            cycle[1] if len(cycle) > 1 else None,
        )

    def _error(self, what: str, rank: int, index: int | None = None, peer: int | None = None) -> PluginError:
        return self._instance.error(what, rank=rank, in_round=index, peer=peer)


def _order(values: Sequence[SymbolicValue]) -> tuple[int, ...] | None:
    """List the ranks in order if the values after the first are single contributions; None otherwise."""
    order: list[int] = []
    for value in values:
        if value.order is None or (order and len(value.order) > 1):
            return None
        order.extend(value.order)
    return tuple(order)


def _ranks(mask: int) -> list[int]:
    return [rank for rank in range(mask.bit_length()) if mask >> rank & 1]
