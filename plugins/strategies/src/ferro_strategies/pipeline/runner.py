"""Runner: carries out passes; when one fails on one rank, it ends on all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ferro import ProcessGroup, UsageError

from .agreement import agree
from .line import Line
from .mail import Mail
from .passes import Pass
from .routes import Plan, RouteKey
from .walk import in_words


class Runner:
    """Carries out passes of one pipeline on one rank.

    A rank whose part fails sends word along the routes on which more is expected, instead of an
    array, and takes what others still send. Whoever gets the word does the same. So all come to
    the end of the pass, soon and with nothing left on the way, and there learn what happened.

    Args:
        group: the pipeline's ranks.
        lines: of the routes that begin or end here.

    Attributes:
        busy_s: how long this rank's actions took in the last pass, but for their mail.
    """

    def __init__(self, group: ProcessGroup, lines: Mapping[RouteKey, Line]) -> None:
        self._group = group
        self._lines = lines
        self.busy_s = 0.0
        self._unfinished = ""
        self._place = ""

    def run(self, plan: Plan, work: Pass) -> float:
        """Carry out a pass; return the sum of all ranks' losses.

        Args:
            plan: what this rank does.
            work: how it does it.

        Raises:
            UsageError: an earlier pass failed. And see `agree`.
        """
        op = plan.call.op
        self._enter(op)
        mail = Mail(plan, self._lines)
        total = agree(self._group, op, lambda: self._carry_out(plan, work, mail), self._told)
        self._unfinished = ""
        return total

    def settle(self, op: str, action: Callable[[], None]) -> None:
        """Do what follows a pass, on all ranks, and learn whether it ended well on all.

        Raises:
            Exception: see `agree`.
        """
        self._enter(op)
        self._place = "the reduction of gradients"

        def attempt() -> float:
            action()
            return 0.0

        agree(self._group, op, attempt, self._told)
        self._unfinished = ""

    def _enter(self, op: str) -> None:
        if self._unfinished:
            raise UsageError(
                f"{op} on group {self._group.name!r}: an earlier {self._unfinished} failed, so "
                "the ranks' gradients no longer belong together. Find its error; then make the "
                "pipeline anew, on a group that is still good, from a checkpoint.",
                op=op,
                group=self._group.name,
                rank=self._group.rank,
            )
        self._unfinished = op

    def _carry_out(self, plan: Plan, work: Pass, mail: Mail) -> float:
        try:
            self._place = "preparing the batch"
            work.begin()
            self.busy_s = 0.0
            for position, action in enumerate(plan.actions):
                self._place = in_words(action)
                mail.look_ahead(position)
                start, mailing = time.perf_counter(), mail.spent_s
                work.perform(action, mail)
                self.busy_s += time.perf_counter() - start - (mail.spent_s - mailing)
            self._place = "the last transfers"
            mail.finish()
        except Exception:
            mail.stop()
            raise
        return work.loss

    def _told(self) -> str:
        return self._place
