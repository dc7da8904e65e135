"""The pullbacks of a DDP module that have not run yet, and whether a reduction is due.

Several microbatches may be in flight. DDP reduces gradients once, while the last of them goes
backward: a parameter's gradient is complete when no pullback in flight can add to it any more,
and the pullback that leaves none in flight waits for the reduction.
"""

from __future__ import annotations

import weakref

from ferro import UsageError

from ..nn.module import Pullback
from ..nn.trees import Arrays


class PendingBackward:
    """One pullback of the wrapped module, which runs at most once."""

    __slots__ = ("__weakref__", "_pull")

    def __init__(self, pull: Pullback) -> None:
        self._pull: Pullback | None = pull

    def __call__(self, grad_y: Arrays) -> Arrays | None:
        """Run the pullback, and drop its activations."""
        pull, self._pull = self._pull, None
        assert pull is not None
        return pull(grad_y)

    @property
    def has_run(self) -> bool:
        """True when the pullback has run."""
        return self._pull is None


class PendingBackwards:
    """All pullbacks that exist and have not run yet.

    Attributes:
        reduction_due: whether a forward pass was made outside `no_sync` since the last reduction,
            so that the gradients have to be reduced.
        reduction_begun: whether a pullback has run since the reduction became due.
        has_local_gradients: whether a pullback has run since the last reduction that leads to none.
    """

    def __init__(self) -> None:
        self.reduction_due = False
        self.reduction_begun = False
        self.has_local_gradients = False
        self._failed = False
        self._pending: weakref.WeakSet[PendingBackward] = weakref.WeakSet()

    def check_forward_allowed(self) -> None:
        """Refuse a forward pass while a reduction has begun and not ended.

        Raises:
            UsageError: a reduction has begun, or an earlier backward pass failed.
        """
        if self._failed:
            raise UsageError(
                "DDP: an earlier backward pass failed on this rank, while other ranks may have "
                "gone on: their gradients no longer belong together. Find its error, and restart "
                "from a checkpoint."
            )
        if self.reduction_begun:
            raise UsageError(
                f"DDP: gradients were not reduced, for {len(self._pending)} pullback(s) made "
                "earlier have not been run. Run every pullback or drop it (`del pullback`) "
                "before the last one goes backward; evaluate with model(x), which keeps none."
            )
        if not self._pending:
            self.reduction_due = False  # the pullbacks that made it due were dropped

    def check_step_allowed(self) -> None:
        """Refuse a step with gradients of this rank alone.

        Raises:
            UsageError: the last gradients have not been reduced.
        """
        if self._failed:
            self.check_forward_allowed()
        if self.reduction_begun:
            raise UsageError(
                f"DDP: the optimizer is about to step with gradients of this rank alone, for {len(self._pending)} "
                "pullback(s) made earlier have not been run, so that gradients count as incomplete. Run every "
                "pullback or drop it (`del pullback`) before the last one goes backward; evaluate with model(x), which "
                "keeps none. Nothing was updated."
            )
        if self.has_local_gradients:
            raise UsageError(
                "DDP: the optimizer is about to step with gradients of this rank alone: the last backward pass belongs "
                "to a forward pass in no_sync(), and nothing has reduced its gradients since. Make the last forward "
                "pass of a step outside no_sync(), or call model.sync_gradients() before the step, on all ranks. (For "
                "steps of each rank alone, train model.module.) Nothing was updated."
            )

    def add(self, pull: Pullback, *, sync: bool) -> PendingBackward:
        """Count a pullback as pending; with `sync`, a reduction is due from now on."""
        backward = PendingBackward(pull)
        self._pending.add(backward)
        self.reduction_due = self.reduction_due or sync
        return backward

    def run(self, backward: PendingBackward, grad_y: Arrays) -> Arrays | None:
        """Run a pullback, which is then no longer pending."""
        self.reduction_begun = self.reduction_due
        self.has_local_gradients = self.has_local_gradients or not self.reduction_due
        try:
            grad_x = backward(grad_y)
        except BaseException:
            self._failed = self.reduction_due
            raise
        finally:
            self._pending.discard(backward)
        return grad_x

    @property
    def gradients_complete(self) -> bool:
        """True when a reduction is due and no pullback is left that could add to a gradient."""
        return self.reduction_due and not self._pending

    def end_reduction(self) -> None:
        """Note that the gradients are being reduced, so that no reduction is due."""
        self.reduction_due = self.reduction_begun = self.has_local_gradients = False
