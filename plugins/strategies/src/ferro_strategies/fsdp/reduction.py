"""Reduction: the way of a unit's gradient from whole ones on all ranks to the mean in pieces.

    whole --reduce_scatter over shards--> piece --all_reduce over replicas--> added to `grad`

Either step is left out where there is no such group. Both run in the background; `advance` is
called in the same places on every rank, and so the steps of several reductions come in one order.
"""

from __future__ import annotations

from ferro import Work

from .flat import Flat
from .memory import Loan
from .plan import Plan


class Reduction:
    """One under way, from when this is made.

    Args:
        flat: whose gradient it is. Nothing may be added to it until the first step has ended.
        plan: see there.
        scale: by what the mean over all ranks is multiplied.

    Attributes:
        flat: as given.
    """

    def __init__(self, flat: Flat, plan: Plan, scale: float) -> None:
        self.flat = flat
        self._plan = plan
        self._scale = scale
        self._work: Work[object] | None = None
        whole = _converted(flat.whole_grad.take(), flat, plan)
        self._piece = whole
        self._scattered = plan.shards is None
        self._whole: Loan | None = None  # while it is being sent
        if plan.shards is not None:
            self._piece = flat.landing_place()
            self._whole = whole
            self._work = plan.shards.reduce_scatter(
                whole.array, "mean", out=self._piece.array, async_op=True, copy=False
            )
            if not flat.whole_grad.keeps(whole):
                plan.pool.send(whole)
        else:
            self._over_replicas()

    def advance(self) -> bool:
        """Wait for the step under way and start the next; say whether this was the last."""
        if self._work is not None:
            try:
                self._work.wait()
            except BaseException:
                self._forfeit()
                raise
            self._work = self._whole = None
        if not self._scattered and self._plan.replicas is not None:
            self._scattered = True
            self._over_replicas()
            return False
        if self._scale != 1:
            array = self._piece.array
            array *= array.dtype.type(self._scale)
        self.flat.land(self._piece.array)
        return True

    def _over_replicas(self) -> None:
        assert self._plan.replicas is not None, "there are shards, or replicas, or both"
        array = self._piece.array
        self._work = self._plan.replicas.all_reduce(array, "mean", out=array, async_op=True)

    def _forfeit(self) -> None:
        """Let nobody have the memory again: other ranks may still reach it."""
        self._piece.forfeit()
        if self._whole is not None:
            self._whole.forfeit()

    def __del__(self) -> None:
        if self._work is not None:
            self._forfeit()


def _converted(whole: Loan, flat: Flat, plan: Plan) -> Loan:
    """Return the whole gradient in the type in which it is reduced."""
    if whole.array.dtype == flat.reduce_dtype:
        return whole
    source = whole.array
    wide = plan.pool.take(flat.namespace, source.size, flat.reduce_dtype)
    wide.array[...] = source
    return wide
