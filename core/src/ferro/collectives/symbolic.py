"""Runs a collective on symbols in place of bytes: the checker's engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ferro.collectives.contract import Contract
from ferro.collectives.messages import Message, Subject
from ferro.collectives.schedule import Schedule
from ferro.errors import PluginError


class Term(NamedTuple):
    """What a chunk holds: contributions of ranks, combined in a certain order.

    Attributes:
        ranks: bit r is set when rank r's contribution is in it.
        number: two terms of one run have the same number when they were combined alike, round by
            round; a contribution by itself has its rank's.
        order: the ranks, where the term is (((x_a op x_b) op x_c) …); None where it is bracketed
            in another way.
        at_once: all contributions were combined in one round.
    """

    ranks: int
    number: int
    order: tuple[int, ...] | None
    at_once: bool


class SymbolicRun:
    """All ranks of one collective, each going through its rounds as messages allow."""

    def __init__(
        self, subject: Subject, contract: Contract, schedules: Sequence[Schedule], messages: Sequence[Message]
    ) -> None:
        n = subject.world_size
        self._subject = subject
        self._contract = contract
        self._chunks = schedules[0].chunks
        self._rounds = [len(schedule.rounds) for schedule in schedules]
        self._outbox: list[list[list[Message]]] = [[[] for _ in s.rounds] for s in schedules]
        self._inbox: list[list[list[Message]]] = [[[] for _ in s.rounds] for s in schedules]
        for message in messages:
            self._outbox[message.source][message.sent_in].append(message)
            self._inbox[message.target][message.received_in].append(message)
        # For each rank and round, how many of the messages it waits for are not sent yet.
        self._unsent = [[len(inbox) for inbox in inboxes] for inboxes in self._inbox]
        # What each message on its way carries: of whom its sender had heard, and its chunks.
        self._payloads: dict[Message, tuple[int, list[Term]]] = {}
        # The round that each rank is in, and the ranks whose round can end.
        self._at = [-1] * n
        self._ready: list[int] = []
        self._heard = [1 << rank for rank in range(n)]
        self._held = [
            {
                chunk: Term(1 << rank, rank, (rank,), at_once=True)
                for chunk in contract.start(rank, n, subject.root, self._chunks)
            }
            for rank in range(n)
        ]
        self._numbers: dict[tuple[int, ...], int] = {}

    def to_the_end(self) -> None:
        """Let every rank go through all its rounds.

        Raises:
            PluginError: ranks wait for each other, or a rank does what makes no sense.
        """
        for rank in range(self._subject.world_size):
            self._enter(rank, 0)
        while self._ready:
            rank = self._ready.pop()
            self._receive(rank, self._at[rank])
            self._enter(rank, self._at[rank] + 1)
        for rank, reached in enumerate(self._at):
            if reached < self._rounds[rank]:
                self._raise_deadlock(rank)

    def results(self) -> list[list[Term]]:
        """For each chunk, what the ranks that must hold it at the end do hold.

        Raises:
            PluginError: a rank that must hold a chunk does not, or not completely; or, in a
                barrier, a rank ends before it has heard of all others.
        """
        n, root = self._subject.world_size, self._subject.root
        everybody = (1 << n) - 1
        results: list[list[Term]] = [[] for _ in range(self._chunks)]
        for rank, held in enumerate(self._held):
            for chunk in self._contract.end(rank, n, root, self._chunks):
                term = held.get(chunk)
                if term is None:
                    raise self._error(f"ends without chunk {chunk}. Send it there.", rank)
                if self._contract.reduces and term.ranks != everybody:
                    raise self._error(
                        f"ends with chunk {chunk} lacking the contributions of ranks "
                        f"{_ranks(everybody & ~term.ranks)}. Send them there, with reduce.",
                        rank,
                    )
                results[chunk].append(term)
        if self._chunks == 0:
            self._check_heard(everybody)
        return results

    def _enter(self, rank: int, index: int) -> None:
        """Begin a round: send, and wake whoever waited for nothing else."""
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
        """End a round: all its messages are here; overwrite and combine."""
        overwritten: dict[int, Term] = {}
        combined: dict[int, list[tuple[int, Term]]] = {}
        for message in self._inbox[rank][index]:
            heard, terms = self._payloads.pop(message)
            self._heard[rank] |= heard
            for chunk, term in zip(message.chunks, terms, strict=True):
                if message.reduce:
                    combined.setdefault(chunk, []).append((message.source, term))
                elif chunk in overwritten:
                    raise self._error(
                        f"overwrites chunk {chunk} twice in one round. Receive it once, or with reduce.",
                        rank,
                        index,
                        message.source,
                    )
                else:
                    overwritten[chunk] = term
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

    def _combine(self, rank: int, index: int, chunk: int, operands: list[tuple[int, Term]]) -> Term:
        """Combine what came from these ranks, and what was here, in order of rank."""
        n = self._subject.world_size
        operands.sort()
        terms = [term for _, term in operands]
        ranks = 0
        for peer, term in operands:
            if ranks & term.ranks:
                raise self._error(
                    f"combines chunk {chunk} with the contributions of ranks "
                    f"{_ranks(ranks & term.ranks)} twice. Let each arrive once.",
                    rank,
                    index,
                    None if peer == rank else peer,
                )
            ranks |= term.ranks
        numbers = tuple(term.number for term in terms)
        return Term(
            ranks,
            self._numbers.setdefault(numbers, n + len(self._numbers)),
            _order(terms),
            at_once=all(number < n for number in numbers),
        )

    def _check_heard(self, everybody: int) -> None:
        for rank, heard in enumerate(self._heard):
            if heard != everybody:
                raise self._error(
                    f"ends before it has heard, even through others, of ranks "
                    f"{_ranks(everybody & ~heard)}. Let their messages reach it.",
                    rank,
                )

    def _raise_deadlock(self, rank: int) -> None:
        """Follow who waits for whom from a rank that is stuck until a rank comes again."""
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
        return self._subject.error(what, rank=rank, in_round=index, peer=peer)


def _order(terms: Sequence[Term]) -> tuple[int, ...] | None:
    """The order of contributions if single ones are put to the right of the first term."""
    order: list[int] = []
    for term in terms:
        if term.order is None or (order and len(term.order) > 1):
            return None
        order.extend(term.order)
    return tuple(order)


def _ranks(mask: int) -> list[int]:
    """The ranks whose bits are set."""
    return [rank for rank in range(mask.bit_length()) if mask >> rank & 1]
