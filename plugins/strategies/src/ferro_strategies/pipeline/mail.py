"""Mail: what a rank's stages get from each other and from other ranks in one pass."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress

from ferro import FerroError, ProcessGroup

from ..nn.arrays import Array
from .line import Line
from .routes import Plan, RouteKey, routes, taker
from .schedule import Action, PipelineSchedule
from .transfers import Receiver, Sender


def lines(schedule: PipelineSchedule, group: ProcessGroup) -> dict[RouteKey, Line]:
    """Make the line of each route that begins or ends here; every rank calls it."""
    return {
        route.key: Line(
            group.subgroup(
                [route.source, route.target], name=f"{group.name}: {route} from rank {route.source}"
            ),
            group.name,
        )
        for route in routes(schedule)
        if group.rank in (route.source, route.target)
    }


class Mail:
    """Hands arrays over: directly between stages of this rank, else along routes.

    Args:
        plan: what this rank does.
        lines: those of its routes.

    Attributes:
        spent_s: how long `take` and `give` have taken together, in seconds.
    """

    def __init__(self, plan: Plan, lines: Mapping[RouteKey, Line]) -> None:
        self.spent_s = 0.0
        self._plan = plan
        self._senders = {
            route.key: Sender(route, lines[route.key], plan.call) for route in plan.outgoing
        }
        self._receivers = {
            route.key: Receiver(route, lines[route.key], plan.call) for route in plan.incoming
        }
        self._here: dict[Action, Array] = {}

    def look_ahead(self, position: int) -> None:
        """Start the receives that are due before the action at this position."""
        for action in self._plan.asks[position]:
            self._receivers[action.kind, action.stage].ask(action.microbatch)

    def take(self, action: Action) -> Array:
        """Return what an action takes, once; wait for it if it comes from another rank.

        Raises:
            Stopped: the rank that was to send it has stopped.
            CollectiveMismatch: it makes another call than this one.
            FerroError: of the transfer.
        """
        if action in self._here:
            return self._here.pop(action)
        start = time.perf_counter()
        array = self._receivers[action.kind, action.stage].take(action.microbatch)
        self.spent_s += time.perf_counter() - start
        return array

    def give(self, action: Action, array: Array) -> None:
        """Hand what an action has computed to the one that takes it, if one does."""
        receiver = taker(action, self._plan.stages)
        if receiver is None:
            return
        sender = self._senders.get((receiver.kind, receiver.stage))
        if sender is None:
            self._here[receiver] = array
        else:
            start = time.perf_counter()
            sender.send(receiver.microbatch, array)
            self.spent_s += time.perf_counter() - start

    def finish(self) -> None:
        """Wait until all has been sent; raise what went wrong."""
        for sender in self._senders.values():
            sender.finish()

    def stop(self) -> None:
        """End a pass that failed: tell the others, and take what they have sent meanwhile."""
        self._say_last_words()
        for receiver in self._receivers.values():
            receiver.drain()
            self._say_last_words()  # a rank in another call may have come to light
        if self._astray():
            return  # who is in another call may never take what was sent
        for sender in self._senders.values():
            with suppress(FerroError):
                sender.finish()

    def _astray(self) -> bool:
        return any(receiver.other_call is not None for receiver in self._receivers.values())

    def _say_last_words(self) -> None:
        """Wake who waits for this rank; where calls differ, nobody knows who that is."""
        for sender in self._senders.values():
            with suppress(FerroError):
                sender.stop(anyway=self._astray())
