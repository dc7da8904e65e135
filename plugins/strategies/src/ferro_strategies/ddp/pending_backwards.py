"""The pullbacks of a DDP module that have not run yet, and whether a reduction is due.

Several microbatches may be in flight. Gradients are reduced once, while the last of them goes
backward: a parameter's gradient is complete when none in flight can add to it any more, and the
pullback that leaves none in flight waits for the reduction.
"""

from __future__ import annotations

import weakref

from ferro import UsageError

from ..nn.arrays import Array
from ..nn.module import Pullback


class PendingBackward:
    """One pullback from its forward pass until it has run, or nothing refers to it any more."""

    __slots__ = ("__weakref__", "_pull")

    def __init__(self, pull: Pullback) -> None:
        self._pull: Pullback | None = pull

    def __call__(self, grad_y: Array) -> Array | None:
        """Run the pullback, once; afterwards nothing keeps its activations."""
        pull, self._pull = self._pull, None
        assert pull is not None
        return pull(grad_y)

    @property
    def has_run(self) -> bool:
        """Whether it has been run."""
        return self._pull is None


class PendingBackwards:
    """All pullbacks in flight.

    Args:
        strategy: whose they are, for messages.

    Attributes:
        due: whether the gradients are to be reduced: a forward pass was made outside `no_sync`
            since the last reduction.
        begun: whether a pullback has run since they are due.
    """

    def __init__(self, strategy: str) -> None:
        self._strategy = strategy
        self.due = False
        self.begun = False
        self._failed = False
        self._out: weakref.WeakSet[PendingBackward] = weakref.WeakSet()

    def check_start(self) -> None:
        """See that a forward pass may start now.

        Raises:
            UsageError: a reduction has begun and is not over.
        """
        if self._failed:
            raise UsageError(
                f"{self._strategy}: an earlier backward pass failed on this rank, while other "
                "ranks may have gone on: their gradients no longer belong together. Find its "
                "error, and restart from a checkpoint."
            )
        if self.begun:
            raise UsageError(
                f"{self._strategy}: gradients were not reduced, for {len(self._out)} pullback(s) "
                "made earlier have not been run. Run every pullback or drop it (`del pullback`) "
                "before the last one goes backward; evaluate with model(x), which keeps none."
            )
        if not self._out:
            self.due = False  # what made it due was dropped without being run

    def start(self, pull: Pullback, *, sync: bool) -> PendingBackward:
        """Count a pullback in."""
        flight = PendingBackward(pull)
        self._out.add(flight)
        self.due = self.due or sync
        return flight

    def run(self, flight: PendingBackward, grad_y: Array) -> Array | None:
        """Run a pullback and count it out."""
        self.begun = self.due
        try:
            grad_x = flight(grad_y)
        except BaseException:
            self._failed = self.due
            raise
        finally:
            self._out.discard(flight)
        return grad_x

    @property
    def all_landed(self) -> bool:
        """Whether gradients are due, and no pullback is left that could add to them."""
        return self.due and not self._out

    def settle(self) -> None:
        """Note that the gradients are being reduced, and no longer due."""
        self.due = self.begun = False
