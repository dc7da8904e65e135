"""The messages of a collective: each send, matched with its receive.

Mistakes that are found before anything runs (a peer out of range, a send that nobody receives) are raised
here as PluginError, in words for the algorithm's author. Texts count rounds from 1, values from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from ferro.collectives import Build, Recv, Schedule, Send
from ferro.errors import PluginError, UsageError


class Message(NamedTuple):
    """A message from one rank to another, with its round on each of them.

    `number` counts the messages from this source to this target, from 0.
    """

    source: int
    sent_in: int
    target: int
    received_in: int
    chunks: tuple[int, ...]
    reduce: bool
    number: int


@dataclass(frozen=True, slots=True)
class AlgorithmInstance:
    """An algorithm for one collective, world size and root."""

    op: str
    build: Build
    world_size: int
    root: int

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.root < self.world_size:
            raise UsageError(
                f"{self.op}: world_size is {self.world_size} and root is {self.root}. "
                f"Give a world_size of at least 1 and a root from 0 to world_size - 1.",
                op=self.op,
            )

    def schedules(self) -> list[Schedule]:
        """Build every rank's schedule; all must cut the buffer into the same number of chunks."""
        schedules = [self.build(rank, self.world_size, self.root) for rank in range(self.world_size)]
        for rank, schedule in enumerate(schedules):
            if schedule.chunks != schedules[0].chunks:
                raise self.error(
                    f"has {schedule.chunks} chunks where rank 0 has {schedules[0].chunks}. "
                    f"Cut the buffer alike on all ranks.",
                    rank=rank,
                )
        return schedules

    def error(self, what: str, *, rank: int, in_round: int | None = None, peer: int | None = None) -> PluginError:
        """Make an error that names collective, algorithm, world size, root, rank and round."""
        name = getattr(self.build, "__name__", repr(self.build))
        where = f"rank {rank}" if in_round is None else f"rank {rank}, round {in_round + 1}"
        return PluginError(
            f"{self.op} by {name} with {self.world_size} ranks, root {self.root}: {where} {what}",
            op=self.op,
            rank=rank,
            peer=peer,
        )


def match_messages(instance: AlgorithmInstance, schedules: Sequence[Schedule]) -> list[Message]:
    """Match every send with its receive, in the order of rounds between each two ranks.

    Raises:
        PluginError: a peer or chunk is out of range, a message names a chunk twice, a send has
            no receive or a receive no send, or the two name different chunks.
    """
    sent: dict[tuple[int, int], list[tuple[int, Send]]] = {}
    received: dict[tuple[int, int], list[tuple[int, Recv]]] = {}
    for rank, schedule in enumerate(schedules):
        for index, current in enumerate(schedule.rounds):
            for send in current.sends:
                _check_message_end(instance, schedule, rank, index, send)
                sent.setdefault((rank, send.peer), []).append((index, send))
            for recv in current.recvs:
                _check_message_end(instance, schedule, rank, index, recv)
                received.setdefault((recv.peer, rank), []).append((index, recv))
    return [
        message
        for source, target in dict.fromkeys((*sent, *received))
        for message in _between(
            instance, source, target, sent.get((source, target), ()), received.get((source, target), ())
        )
    ]


def _between(
    instance: AlgorithmInstance,
    source: int,
    target: int,
    sent: Iterable[tuple[int, Send]],
    received: Iterable[tuple[int, Recv]],
) -> Iterable[Message]:
    for number, (left, right) in enumerate(zip_longest(sent, received)):
        if left is None:
            raise instance.error(
                f"receives chunks {list(right[1].chunks)} from rank {source}, which has no such "
                f"Send left. Add the Send there or drop this Recv.",
                rank=target,
                in_round=right[0],
                peer=source,
            )
        if right is None:
            raise instance.error(
                f"sends chunks {list(left[1].chunks)} to rank {target}, which has no such Recv "
                f"left. Add the Recv there or drop this Send.",
                rank=source,
                in_round=left[0],
                peer=target,
            )
        if left[1].chunks != right[1].chunks:
            raise instance.error(
                f"receives chunks {list(right[1].chunks)} from rank {source}, but the message "
                f"due next is {list(left[1].chunks)}, sent in round {left[0] + 1}. Name the same "
                f"chunks in the same order on both sides.",
                rank=target,
                in_round=right[0],
                peer=source,
            )
        yield Message(source, left[0], target, right[0], left[1].chunks, right[1].reduce, number)


def _check_message_end(
    instance: AlgorithmInstance, schedule: Schedule, rank: int, in_round: int, end: Send | Recv
) -> None:
    """Check the peer and the chunks of one end of a message."""
    verb = "sends to" if isinstance(end, Send) else "receives from"
    if not 0 <= end.peer < instance.world_size or end.peer == rank:
        what = f"{verb} rank {end.peer}. A peer is another rank of the group."
    elif any(not 0 <= chunk < schedule.chunks for chunk in end.chunks):
        what = (
            f"{verb} rank {end.peer} chunks {list(end.chunks)}, of which not all exist. "
            f"Chunks are numbered from 0; the schedule has {schedule.chunks}."
        )
    elif len(end.chunks) > 1 and len(set(end.chunks)) < len(end.chunks):
        what = f"{verb} rank {end.peer} chunks {list(end.chunks)}. Name each chunk once."
    else:
        return
    raise instance.error(what, rank=rank, in_round=in_round, peer=end.peer)
