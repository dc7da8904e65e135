"""PassRunner: runs the passes of a pipeline, and ends a pass on all ranks if it fails on one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ferro import ProcessGroup, UsageError

from ...nn.arrays import Array
from .agreement import agree
from .channel import StageChannel
from .loss import LossTotals
from .passes import PipelinePass
from .plan import Edge, EdgeKey, PassPlan
from .point_to_point import PointToPoint, begin_pass


class PassRunner:
    """Runs passes of one pipeline on one rank.

    A rank that fails sends a stop message instead of an array along each edge on which more is expected, and receives
    the messages that others still send. A rank that gets a stop message does the same. So all ranks soon reach the end
    of the pass, with no message left in a channel, and learn there what failed.

    Args:
        group: the pipeline's ranks.
        edges: the edges of all ranks, in the same order on every rank.
        channels: the channels of those that begin or end on this rank.

    Attributes:
        busy_s: the time that this rank's actions took in the last pass, without their transfers.
    """

    def __init__(self, group: ProcessGroup, edges: Sequence[Edge], channels: Mapping[EdgeKey, StageChannel]) -> None:
        self._group = group
        self._edges = edges
        self._channels = channels
        self.busy_s = 0.0
        self._unfinished_op = ""
        self._activity = ""

    def run(self, plan: PassPlan, work: PipelinePass) -> Array:
        """Run a pass; return the sum over all ranks of their `LossTotals`, as an array.

        Args:
            plan: this rank's actions and transfers.
            work: computes the actions.

        Raises:
            UsageError: an earlier pass failed.
            Exception: this pass failed, on this rank or another; see `agree`.
        """
        op = plan.call.op
        self._enter(op)
        transfers = PointToPoint(plan, self._channels)
        totals = agree(
            self._group, op, lambda: self._execute(plan, work, transfers), LossTotals.NUMBERS, self._get_activity
        )
        self._unfinished_op = ""
        return totals

    def run_after(self, op: str, reduce: Callable[[], None]) -> None:
        """Run the reduction of gradients that follows a pass, and agree on its success.

        Args:
            op: name of the method that is attempted, for error messages.
            reduce: reduces this rank's gradients.

        Raises:
            Exception: the reduction failed, on this rank or another; see `agree`.
        """
        self._enter(op)
        self._activity = "the reduction of gradients"

        def attempt() -> Array:
            reduce()
            return np.empty(0)

        agree(self._group, op, attempt, 0, self._get_activity)
        self._unfinished_op = ""

    def _enter(self, op: str) -> None:
        if self._unfinished_op:
            raise UsageError(
                f"{op} on group {self._group.name!r}: an earlier {self._unfinished_op} failed, so "
                "the ranks' gradients no longer belong together. Find its error; then make the "
                "pipeline anew, on a group that is still good, from a checkpoint.",
                op=op,
                group=self._group.name,
                rank=self._group.rank,
            )
        self._unfinished_op = op

    def _execute(self, plan: PassPlan, work: PipelinePass, transfers: PointToPoint) -> Array:
        try:
            self._activity = "preparing the messages between stages"
            begin_pass(self._edges, self._channels)
            self._activity = "preparing the batch"
            work.begin()
            self.busy_s = 0.0
            for position, action in enumerate(plan.actions):
                self._activity = str(action)
                transfers.start_receives(position)
                start, transferring_s = time.perf_counter(), transfers.spent_s
                work.perform(action, transfers)
                elapsed_s = time.perf_counter() - start
                self.busy_s += elapsed_s - (transfers.spent_s - transferring_s)
            self._activity = "the last transfers"
            transfers.finish()
        except Exception:
            transfers.stop()
            raise
        return work.totals.as_array()

    def _get_activity(self) -> str:
        return self._activity
