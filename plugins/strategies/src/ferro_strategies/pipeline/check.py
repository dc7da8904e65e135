"""The checker: proves that a schedule works, before anything runs.

The model of what runs it:

- A rank takes its actions one at a time, in its order. Before one that needs what a stage on
  another rank computes, it waits for the message; what a stage on the same rank computes is there.
- After an action whose result a stage on another rank needs, it hands the message over and goes
  on at once. The message leaves when the receiver takes it, and not before: nothing is assumed of
  buffers on the way. The sender keeps it until then, and waits for what is left only at the end.
- Between any two ranks there are two lanes each way, one for outputs and one for gradients. A lane
  carries messages in the order in which they were handed over, and the receiver takes them in the
  order in which its actions need them; it may do so ahead of time.

So the k-th message handed over in a lane must be the k-th that is needed. As every lane has one
order on both ends, and no rank chooses by time, what a rank can do next it can still do later:
that one walk through all actions comes to its end proves that every run does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from ferro import UsageError

from .schedule import Action, Kind, PipelineSchedule
from .walk import in_words, need, walk


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found of a schedule, beyond that it works.

    Attributes:
        peak_activations: for each rank, how many microbatches its stages hold at most, summed over
            its stages: from the start of the forward pass to the end of the backward pass, or of
            the parameters' gradients where these are computed apart.
        messages: for each rank, how many messages it sends.
        needs_tags: whether outputs and gradients between some two ranks are received in another
            order than sent, so that they must be told apart by a tag or travel apart. No schedule
            that `build` makes does.
    """

    peak_activations: tuple[int, ...]
    messages: tuple[int, ...]
    needs_tags: bool


def check(schedule: PipelineSchedule) -> Verdict:
    """Prove that a schedule works, under the model above.

    Proved is: every rank has exactly the actions of its stages, each once; a backward pass comes
    after its forward pass, and parameters' gradients after their backward pass; every message is
    received, in the order sent; no rank waits for ever.

    Raises:
        UsageError: it does not; names the first fault, with rank and action.
    """
    _check_sizes(schedule)
    peaks = tuple(_check_rank(schedule, rank) for rank in range(schedule.ranks))
    _check_complete(schedule)
    sent, received = _Traffic(), _Traffic()
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            source = need(schedule, action)
            if source is not None:
                received.add(schedule.rank_of[source.stage], rank, source)
            target = _reader(schedule, action)
            if target is not None:
                sent.add(rank, target, action)
    _check_lanes(schedule, sent, received)
    for _ in walk(schedule):
        pass
    return Verdict(
        peak_activations=peaks,
        messages=tuple(sent.count_from(rank) for rank in range(schedule.ranks)),
        needs_tags=sent.together != received.together,
    )


class _Traffic:
    """Messages between ranks in order, by the action that computes them.

    Attributes:
        lanes: by sender, receiver and kind.
        together: by sender and receiver.
    """

    def __init__(self) -> None:
        self.lanes: defaultdict[tuple[int, int, Kind], list[Action]] = defaultdict(list)
        self.together: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)

    def add(self, source: int, target: int, action: Action) -> None:
        if source != target:
            self.lanes[source, target, action.kind].append(action)
            self.together[source, target].append(action)

    def count_from(self, rank: int) -> int:
        return sum(len(items) for (source, _), items in self.together.items() if source == rank)


def _reader(schedule: PipelineSchedule, action: Action) -> int | None:
    """Return the rank that needs what an action computes, or None if no other action does."""
    if action.kind is Kind.FORWARD and action.stage < schedule.stages - 1:
        return schedule.rank_of[action.stage + 1]
    if action.kind is Kind.BACKWARD and action.stage > 0:
        return schedule.rank_of[action.stage - 1]
    return None


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
    """See that a rank's actions make sense among themselves; return its peak of activations."""
    seen: set[Action] = set()
    last = Kind.WEIGHT if schedule.splits_backward else Kind.BACKWARD
    held = peak = 0
    for position, action in enumerate(schedule.actions[rank]):
        fault = _fault(schedule, rank, action, seen)
        if fault:
            raise UsageError(
                f"pipeline schedule {schedule.name!r}: action {position} of rank {rank}, "
                f"{in_words(action)}, {fault}.",
                rank=rank,
            )
        seen.add(action)
        held += (action.kind is Kind.FORWARD) - (action.kind is last)
        peak = max(peak, held)
    return peak


def _fault(schedule: PipelineSchedule, rank: int, action: Action, seen: set[Action]) -> str | None:
    """Return what is wrong with an action that comes after those seen, if anything is."""
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
        return f"comes before {in_words(Action(before, action.stage, action.microbatch))}"
    return None


def _check_complete(schedule: PipelineSchedule) -> None:
    kinds = [kind for kind in Kind if kind is not Kind.WEIGHT or schedule.splits_backward]
    for rank, actions in enumerate(schedule.actions):
        wanted = len(kinds) * len(schedule.stages_of(rank)) * schedule.microbatches
        if len(actions) == wanted:  # none of them twice, none of another rank: so it is all
            continue
        present = set(actions)
        missing = next(item for item in _all_of(schedule, rank, kinds) if item not in present)
        raise UsageError(
            f"pipeline schedule {schedule.name!r}: rank {rank} lacks {wanted - len(actions)} of "
            f"its {wanted} actions, the first of them {in_words(missing)}.",
            rank=rank,
        )


def _all_of(schedule: PipelineSchedule, rank: int, kinds: list[Kind]) -> Iterator[Action]:
    return (
        Action(kind, stage, microbatch)
        for stage in schedule.stages_of(rank)
        for microbatch in range(schedule.microbatches)
        for kind in kinds
    )


def _check_lanes(schedule: PipelineSchedule, sent: _Traffic, received: _Traffic) -> None:
    for lane in sorted(sent.lanes.keys() | received.lanes.keys()):
        if sent.lanes[lane] == received.lanes[lane]:
            continue
        source, target, _ = lane
        pairs = zip_longest(sent.lanes[lane], received.lanes[lane])
        position, (given, wanted) = next(
            (i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1]
        )
        assert given is not None, "a complete schedule sends whatever is needed"
        assert wanted is not None, "a complete schedule needs whatever is sent"
        raise UsageError(
            f"pipeline schedule {schedule.name!r}: message {position} from rank {source} to rank "
            f"{target} is the result of {in_words(given)}, but rank {target} needs that of "
            f"{in_words(wanted)} first. Give both ranks the same order.",
            rank=target,
            peer=source,
        )
