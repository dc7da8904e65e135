"""Point to point: the arrays that a rank's stages exchange with each other and with other ranks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

from ferro import FerroError, GroupClosed, ProcessGroup

from ...nn.trees import Arrays
from ..schedules.schedule import Action, PipelineSchedule
from ..schedules.topological_order import consumer
from .channel import StageChannel
from .error_translation import translated_errors
from .plan import Edge, EdgeKey, PassPlan, edges
from .transfers import PassStopped, StageReceiver, StageSender


def open_channels(schedule: PipelineSchedule, group: ProcessGroup) -> dict[EdgeKey, StageChannel]:
    """Make the channel of each edge that begins or ends on this rank; every rank calls it."""
    return {
        edge.key: StageChannel(
            group.subgroup([edge.source, edge.target], name=f"{group.name}: {edge} from rank {edge.source}"), group.name
        )
        for edge in edges(schedule)
        if group.rank in (edge.source, edge.target)
    }


def begin_pass(all_edges: Iterable[Edge], channels: Mapping[EdgeKey, StageChannel]) -> None:
    """Begin a pass on all channels of this rank; every rank calls it, and goes through the edges in the same order.

    Raises:
        PassStopped: the rank at the other end could not begin the pass.
        FerroError: it is gone, or did not come.
    """
    left = [(edge, channels[edge.key]) for edge in all_edges if edge.key in channels]
    try:
        while left:
            edge, channel = left[0]
            with translated_errors(edge, channel, edge.order[0]):
                channel.begin_pass(len(edge.order))
            left.pop(0)
    except BaseException as error:
        for _, channel in left:
            channel.group.abort()  # the other end may wait for this rank, which will not come
        if isinstance(error, GroupClosed):
            raise PassStopped("the rank at the other end has stopped") from error
        raise


class PointToPoint:
    """Hands arrays from stage to stage during one pass: directly on one rank, by messages between ranks.

    Args:
        plan: this rank's actions and edges.
        channels: the channel of each edge of the plan.

    Attributes:
        spent_s: the time that `recv` and `send` have taken together, in seconds.
    """

    def __init__(self, plan: PassPlan, channels: Mapping[EdgeKey, StageChannel]) -> None:
        self.spent_s = 0.0
        self._plan = plan
        self._senders = {edge.key: StageSender(edge, channels[edge.key], plan.call) for edge in plan.outgoing}
        self._receivers = {edge.key: StageReceiver(edge, channels[edge.key], plan.call) for edge in plan.incoming}
        self._local: dict[Action, Arrays] = {}

    def start_receives(self, position: int) -> None:
        """Start the receives that are due before the action at this position."""
        for action in self._plan.receives[position]:
            self._receivers[action.kind, action.stage].start(action.microbatch)

    def recv(self, action: Action) -> Arrays:
        """Return the input of an action (once for each action); wait for it if another rank sends it.

        Raises:
            PassStopped: the rank that was to send it has stopped.
            CollectiveMismatch: the sender executes another call than this rank.
            FerroError: the transfer failed.
        """
        if action in self._local:
            return self._local.pop(action)
        start = time.perf_counter()
        array = self._receivers[action.kind, action.stage].recv(action.microbatch)
        self.spent_s += time.perf_counter() - start
        return array

    def send(self, action: Action, array: Arrays) -> None:
        """Send the result of an action to the action that needs it, if there is one."""
        target = consumer(action, self._plan.stages)
        if target is None:
            return
        sender = self._senders.get((target.kind, target.stage))
        if sender is None:
            self._local[target] = array
        else:
            start = time.perf_counter()
            sender.send(target.microbatch, array)
            self.spent_s += time.perf_counter() - start

    def finish(self) -> None:
        """Wait until all messages have been sent; raise the error of a send that failed."""
        for sender in self._senders.values():
            sender.finish()

    def stop(self) -> None:
        """End a pass that failed: send stop messages, and receive the messages that other ranks still send."""
        self._send_stops()
        for receiver in self._receivers.values():
            receiver.drain()
            self._send_stops()  # the messages may have shown that a rank is in another call
        if self._calls_differ():
            return  # a rank in another call may never receive what this rank has sent
        for sender in self._senders.values():
            with suppress(FerroError):
                sender.finish()

    def _calls_differ(self) -> bool:
        return any(receiver.other_call is not None for receiver in self._receivers.values())

    def _send_stops(self) -> None:
        """Send stop messages: to the ranks that expect arrays, or to all if a rank executes another call."""
        for sender in self._senders.values():
            with suppress(FerroError):
                sender.stop(always=self._calls_differ())
