"""The checker: it proves before anything runs that a schedule is complete and cannot deadlock.

The proof assumes this model of the execution:

- A rank takes its actions one at a time, in its order. Before an action that needs the result of a stage on another
  rank, it waits for the message; a result of a stage on the same rank is there already.
- After an action whose result a stage on another rank needs, the rank starts an asynchronous send, which ends only when
  the receiver takes the message, as if the network had no buffers. At the end of the pass the rank waits for all its
  sends.
- Between any two ranks there are two channels each way, one for outputs and one for gradients. A
  channel carries messages in the order in which they were sent, and the receiver takes them in the
  order in which its actions need them; it may do so ahead of time.

So the k-th message sent in a channel must be the k-th that is needed. No rank chooses its next action by time, and an
action that can run stays able to run until it does. Therefore one topological order of all actions proves that every
run ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from ferro import UsageError

from .schedule import Action, Kind, PipelineSchedule
from .topological_order import consumer, producer, topological_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Figures of a schedule that works.

    Attributes:
        peak_activations: for each rank, the most microbatches that its stages hold, summed over its stages. A stage
            holds one from the start of its forward pass to the end of its backward pass, or of its WEIGHT action where
            there is one.
        messages: for each rank, the number of messages that it sends.
        needs_tags: whether two ranks exist between which outputs and gradients are received in another order than they
            are sent, so that they need tags or separate channels. This is False for all schedules that `build` makes.
    """

    peak_activations: tuple[int, ...]
    messages: tuple[int, ...]
    needs_tags: bool


def check(schedule: PipelineSchedule) -> Verdict:
    """Prove that a schedule works, under the model above.

    A schedule works if every rank has exactly the actions of its stages, each once; a backward
    pass comes after its forward pass, and parameters' gradients after their backward pass; every
    message is received, in the order sent; and no rank waits for ever.

    Raises:
        UsageError: the schedule does not work; the message names the first fault, with rank and
            action.
    """
    _check_sizes(schedule)
    peaks = tuple(_check_rank(schedule, rank) for rank in range(schedule.ranks))
    _check_complete(schedule)
    sent, received = _MessageOrder(), _MessageOrder()
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            needed = producer(action, schedule.stages)
            if needed is not None:
                received.add(schedule.rank_of[needed.stage], rank, needed)
            reader = consumer(action, schedule.stages)
            if reader is not None:
                sent.add(rank, schedule.rank_of[reader.stage], action)
    _check_message_order(schedule, sent, received)
    for _ in topological_order(schedule):  # raises if it does not reach all actions
        pass
    return Verdict(
        peak_activations=peaks,
        messages=tuple(sent.count_from(rank) for rank in range(schedule.ranks)),
        needs_tags=sent.by_ranks != received.by_ranks,
    )


class _MessageOrder:
    """Messages between ranks in order, each given as the action that computes it.

    Attributes:
        by_channel: by sender, receiver and kind.
        by_ranks: by sender and receiver.
    """

    def __init__(self) -> None:
        self.by_channel: defaultdict[tuple[int, int, Kind], list[Action]] = defaultdict(list)
        self.by_ranks: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)

    def add(self, source: int, target: int, action: Action) -> None:
        if source != target:
            self.by_channel[source, target, action.kind].append(action)
            self.by_ranks[source, target].append(action)

    def count_from(self, rank: int) -> int:
        return sum(len(items) for (source, _), items in self.by_ranks.items() if source == rank)


def _check_sizes(schedule: PipelineSchedule) -> None:
    if schedule.stages < 1 or schedule.microbatches < 1:
        raise UsageError(
            f"pipeline schedule {schedule.name!r} has {schedule.stages} stages and "
            f"{schedule.microbatches} microbatches; it needs at least one of each."
        )
    for stage, rank in enumerate(schedule.rank_of):
        if not 0 <= rank < schedule.ranks:
            raise UsageError(
                f"pipeline schedule {schedule.name!r} has stage {stage} on rank {rank}, but "
                f"actions for ranks 0 to {schedule.ranks - 1} only.",
                rank=rank,
            )


def _check_rank(schedule: PipelineSchedule, rank: int) -> int:
    """Check that a rank's actions fit each other; return its peak of activations."""
    seen: set[Action] = set()
    held = peak = 0
    for position, action in enumerate(schedule.actions[rank]):
        fault = _fault(schedule, rank, action, seen)
        if fault:
            raise UsageError(
                f"pipeline schedule {schedule.name!r}: action {position} of rank {rank}, {action}, {fault}.", rank=rank
            )
        seen.add(action)
        held += (action.kind is Kind.FORWARD) - (action.kind is schedule.last_kind)
        peak = max(peak, held)
    return peak


def _fault(schedule: PipelineSchedule, rank: int, action: Action, seen: set[Action]) -> str | None:
    """Describe the fault of an action that comes after those in `seen`; None if it has none."""
    if not 0 <= action.stage < schedule.stages:
        return f"is of no stage: there are {schedule.stages}"
    if not 0 <= action.microbatch < schedule.microbatches:
        return f"is of no microbatch: there are {schedule.microbatches}"
    owner = schedule.rank_of[action.stage]
    if owner != rank:
        return f"belongs on rank {owner}, where that stage is"
    if action in seen:
        return "is there a second time"
    if action.kind is Kind.WEIGHT and not schedule.splits_backward:
        return "is apart, but the schedule does not say that it splits the backward pass"
    before = {Kind.BACKWARD: Kind.FORWARD, Kind.WEIGHT: Kind.BACKWARD}.get(action.kind)
    if before and Action(before, action.stage, action.microbatch) not in seen:
        return f"comes before {Action(before, action.stage, action.microbatch)}"
    return None


def _check_complete(schedule: PipelineSchedule) -> None:
    kinds = [kind for kind in Kind if kind is not Kind.WEIGHT or schedule.splits_backward]
    for rank, actions in enumerate(schedule.actions):
        wanted = len(kinds) * len(schedule.stages_of(rank)) * schedule.microbatches
        if len(actions) == wanted:  # _check_rank found no duplicates, so none is missing
            continue
        present = set(actions)
        missing = next(item for item in _all_of(schedule, rank, kinds) if item not in present)
        raise UsageError(
            f"pipeline schedule {schedule.name!r}: rank {rank} lacks {wanted - len(actions)} of "
            f"its {wanted} actions, the first of them {missing}.",
            rank=rank,
        )


def _all_of(schedule: PipelineSchedule, rank: int, kinds: list[Kind]) -> Iterator[Action]:
    return (
        Action(kind, stage, microbatch)
        for stage in schedule.stages_of(rank)
        for microbatch in range(schedule.microbatches)
        for kind in kinds
    )


def _check_message_order(schedule: PipelineSchedule, sent: _MessageOrder, received: _MessageOrder) -> None:
    for channel in sorted(sent.by_channel.keys() | received.by_channel.keys()):
        if sent.by_channel[channel] == received.by_channel[channel]:
            continue
        source, target, _ = channel
        pairs = zip_longest(sent.by_channel[channel], received.by_channel[channel])
        position, (message, needed) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        assert message is not None, "a complete schedule sends all that is needed"
        assert needed is not None, "a complete schedule needs all that is sent"
        raise UsageError(
            f"pipeline schedule {schedule.name!r}: message {position} from rank {source} to rank "
            f"{target} is the result of {message}, but rank {target} needs that of "
            f"{needed} first. Give both ranks the same order.",
            rank=target,
            peer=source,
        )
