"""Passes: what is gathered, what is gathered ahead, and which reductions are under way.

A pass over units A, B, C and D, gathered (g) and reduced (r) in the background. What stands in
one column is under way at once:

    forward                     backward
    compute     A  B  C  D      compute  D  C  B  A
    gather  gA gB gC gD         gather      gB gA
                                reduce      rD rC rB rA

In each column there are two units of parameters at most. So there are at the end of the forward
half, and those two, D and C, come first in the backward half: they stay. The group carries out
what it is given in one order. So the next unit is asked for when one is entered, and the one
before is reduced when it is left: `rD gB rC gA rB rA`.

What comes next is known from the last pass. If something else comes, what was gathered for
nothing is dropped. All ranks make the same passes, and so the same mistakes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ferro import UsageError

from .gathered import Gathered, Shards
from .joining import Joining
from .plan import Plan
from .reduction import Reduction


class Passes:
    """The passes of one FSDP module.

    Args:
        units: those that have parameters, in definition order.
        plan: see there.

    Attributes:
        units: as given.
        sync: whether backward passes that belong to forward passes made now reduce.
        joining: inside `join`, who tells ranks without batches what happens.
    """

    def __init__(self, units: Sequence[Shards], plan: Plan) -> None:
        self.units = tuple(units)
        self.sync = True
        self.joining: Joining | None = None
        self._plan = plan
        self._running = False
        self._in_backward = False
        self._backward_syncs = False
        self._failed = False
        self._route: Sequence[Shards] = ()
        self._at = 0
        self._ahead: tuple[Shards, Gathered] | None = None
        self._reductions: deque[Reduction] = deque()
        self.forget_routes()

    def forget_routes(self) -> None:
        """Expect units in definition order, as at first."""
        self._entered: list[Shards] = []
        self._left: list[Shards] = []
        # Those whose forward half is made again in the backward half (Checkpoint).
        self._repeated: set[Shards] = set()
        self._expect(self.units, self.units[::-1])

    @property
    def syncs(self) -> bool:
        """Whether what goes forward now is reduced; what goes forward again, as the first time."""
        return self._backward_syncs if self._in_backward else self.sync

    @property
    def is_outside(self) -> bool:
        """Whether no pass is being made."""
        return not self._running

    @contextmanager
    def forward(self, unit: Shards) -> Iterator[Gathered | None]:
        """Let a unit's parameters be whole for a forward half.

        Yields:
            What was gathered, where the backward half is to use it.
        """
        with self._pass(self._forward_route, backward=False):
            if self._in_backward:
                self._repeated.add(unit)
            else:
                self._entered.append(unit)
            gathered = self._take(unit)
            with _opened(gathered, backward=False):
                yield gathered if self._stays(unit) else None
            if not self._in_backward:
                self._left.append(unit)

    @contextmanager
    def backward(self, unit: Shards, gathered: Gathered | None, *, sync: bool) -> Iterator[None]:
        """Let a unit's parameters be whole for a backward half; reduce gradients after it."""
        with self._pass(self._backward_route, backward=True):
            self._backward_syncs = sync
            self._let_go(unit)
            if gathered is None:
                gathered = self._take(unit)
            elif self._ahead is None:
                self._fetch_next(unit)
            with _opened(gathered, backward=True, defers=not sync):
                yield
            del gathered
            if sync:
                self._reduce(unit)

    def reduce_all(self) -> None:
        """Reduce what has been accumulated in whole gradients, and wait for it."""
        with self._pass((), backward=True):
            for unit in self.units:
                if unit.has_added:
                    self._reduce(unit)

    def check(self) -> None:
        """See that a pass may be made.

        Raises:
            UsageError: an earlier backward pass failed.
        """
        if self._failed:
            raise UsageError(
                "FSDP: an earlier backward pass failed on this rank, while other ranks may have "
                "gone on: their gradients no longer belong together. Find its error, and restart "
                "from a checkpoint."
            )

    # -- told to all, and done by ranks without batches too -------------------------------------

    def launch_gather(self, unit: Shards) -> Gathered:
        """Start to gather a unit."""
        if self.joining is not None and unit.flats and self._plan.shards is not None:
            self.joining.tell_gather(unit)
        return unit.launch()

    def launch_reduction(self, unit: Shards) -> None:
        """Start to reduce a unit's gradients; older ones are taken a step further first."""
        if self.joining is not None:
            self.joining.tell_reduction(unit)
        self._advance()
        scale = 1.0 if self.joining is None else self.joining.scale
        for flat in unit.trained:
            self._reductions.append(Reduction(flat, self._plan, scale))

    def drain(self) -> None:
        """Wait until every reduction has landed."""
        if self._reductions and self.joining is not None:
            self.joining.tell_drain()
        while self._reductions:
            self._advance()

    # -- inside ----------------------------------------------------------------------------------

    @contextmanager
    def _pass(self, route: Sequence[Shards], *, backward: bool) -> Iterator[None]:
        if self._running:
            yield
            return
        self._running, self._in_backward = True, backward
        self._route, self._at = route, 0
        try:
            yield
            if backward:
                self.drain()
            else:
                self._expect(self._entered, self._left[::-1])
            self._drop_ahead()
        except BaseException:
            self._failed = self._failed or backward
            raise
        finally:
            # After an error nothing is waited for: the other ranks may be elsewhere.
            self._ahead = None
            self._reductions.clear()
            self._entered, self._left = [], []
            self._running = self._in_backward = False

    def _take(self, unit: Shards) -> Gathered:
        """Return what was gathered ahead, or gather; let the next begin meanwhile."""
        if self._ahead is not None and self._ahead[0] is unit:
            gathered = self._ahead[1]
            self._ahead = None
        else:
            self._drop_ahead()
            gathered = self.launch_gather(unit)
        self._fetch_next(unit)
        gathered.wait()
        return gathered

    def _stays(self, unit: Shards) -> bool:
        """Say whether what is gathered for a forward half serves the backward half."""
        # Inside a backward pass the unit's pullback follows at once.
        return self._plan.gathers_once or self._in_backward or unit in self._staying

    def _expect(self, forward: Sequence[Shards], backward: Sequence[Shards]) -> None:
        """Set what is to come in the halves, and what stays between them."""
        self._forward_route, self._backward_route = forward, backward
        first = list(dict.fromkeys(unit for unit in backward if unit.flats))
        self._staying = {*first[: 1 + self._plan.prefetch]} - self._repeated

    def _fetch_next(self, unit: Shards) -> None:
        pointless = self._plan.gathers_once and self._in_backward
        if not self._plan.prefetch or self._plan.shards is None or pointless:
            return
        try:
            self._at = self._route.index(unit, self._at) + 1
        except ValueError:
            return
        if self._at < len(self._route):
            following = self._route[self._at]
            there = following.is_open or (self._in_backward and following in self._staying)
            if following is not unit and not there:
                self._ahead = following, self.launch_gather(following)

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].wait()
            self._ahead = None

    def _let_go(self, unit: Shards) -> None:
        """See that a unit's gradients are not being sent from memory that they are added to."""
        if self._plan.keeps_whole:
            while any(reduction.flat in unit.trained for reduction in self._reductions):
                self._advance()

    def _reduce(self, unit: Shards) -> None:
        if unit.trained:
            self.launch_reduction(unit)

    def _advance(self) -> None:
        for _ in range(len(self._reductions)):
            reduction = self._reductions.popleft()
            if not reduction.advance():
                self._reductions.append(reduction)


@contextmanager
def _opened(gathered: Gathered, *, backward: bool, defers: bool = False) -> Iterator[None]:
    gathered.open(backward=backward, defers=defers)
    try:
        yield
    finally:
        gathered.close()
