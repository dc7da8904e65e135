"""UnitScheduler decides when units (groups of parameters) are gathered and freed, and gradients reduced.

The table shows a pass over units A, B, C and D, which are gathered (g) and reduced (r) in the background. The
operations in one column are under way at the same time:

    forward                     backward
    compute     A  B  C  D      compute  D  C  B  A
    gather  gA gB gC gD         gather      gB gA
                                reduce      rD rC rB rA

Each column holds the parameters of two units at most. The last two units of the forward pass, C and D, come first in
the backward pass, so they stay gathered. The group runs its operations in the order issued. Therefore the gather of the
next unit starts when a unit begins to compute, and its own reduction starts when it ends: `rD gB rC gA rB rA`.

The order of the units is predicted from the last pass. If another unit comes instead, the prefetched one is dropped.
All ranks run the same passes, and so make the same wrong predictions.

Where all units are small, or there is no core for a second thread (see `spare_cores`), each operation runs in the
caller's thread where it is issued, in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol

import numpy as np

from ferro import UsageError

from ..replica_check import ReplicaAgreement, ReplicaCheck, replicas_error
from ..spare_cores import has_spare_core
from .backward_agreement import BackwardAgreement, units_to_reduce
from .config import FSDPConfig
from .flat_parameter_group import FlatParameterGroup, UnshardedParameters
from .reduction import GradientReduction

# Operations on units of which none is larger run at once. Measured with two ranks on two cores: a step of a perceptron
# of 27,000 parameters took 3.0 ms with the handover, and 1.5 without.
_AT_ONCE_BYTES = 1 << 20

_INSIDE = nullcontext()  # for the operations inside a pass, which the outermost one has begun


class Announcer(Protocol):
    """Tells ranks that have run out of batches which operations they must take part in."""

    @property
    def scale(self) -> float:
        """The factor that turns a mean over all ranks into the mean over the contributing ranks."""

    def announce_gather(self, unit: FlatParameterGroup) -> None:
        """Announce that a unit is gathered."""

    def announce_reduction(self, unit: FlatParameterGroup) -> None:
        """Announce that a unit's gradients are reduced."""

    def announce_drain(self) -> None:
        """Announce that all reductions are waited for."""


class UnitScheduler:
    """The schedule of one FSDP module's passes.

    Args:
        units: the units, in definition order.
        config: the settings of the FSDP module.

    Attributes:
        units: as given.
        sync: whether a forward pass that runs now has its gradients reduced later; False in `no_sync`.
        announcer: inside `join`, the object that announces operations; None elsewhere.
    """

    def __init__(self, units: Sequence[FlatParameterGroup], config: FSDPConfig) -> None:
        self.units = tuple(units)
        self.sync = True
        self.announcer: Announcer | None = None
        self._config = config
        self._running = False
        self._in_backward = False
        self._evaluating = False
        self._backward_syncs = False
        self._failed = False
        self._order: Sequence[FlatParameterGroup] = ()
        self._position = 0
        self._prefetched: tuple[FlatParameterGroup, UnshardedParameters] | None = None
        self._reductions: deque[GradientReduction | ReplicaAgreement | BackwardAgreement] = deque()
        self._backward_agreement: BackwardAgreement | None = None
        self._steps: list[float] = []
        self._at_once = _runs_at_once(self.units, config)
        self._replica_check = None if config.replica_group is None else ReplicaCheck(config.replica_group)
        self._agreement: ReplicaAgreement | None = None
        self.reset_order()

    def reset_order(self) -> None:
        """Predict definition order for the next pass, as for the first one."""
        self._entered: list[FlatParameterGroup] = []
        self._left: list[FlatParameterGroup] = []
        # Checkpoint runs the forward pass of these units again during the backward pass.
        self._recomputed: set[FlatParameterGroup] = set()
        self._predict(self.units, self.units[::-1])

    @property
    def syncs(self) -> bool:
        """`sync` for the forward pass of a unit; a recomputation has that of the running backward pass."""
        return self._backward_syncs if self._in_backward else self.sync

    @property
    def in_pass(self) -> bool:
        """True while a pass is under way."""
        return self._running

    @contextmanager
    def forward(self, unit: FlatParameterGroup, *, evaluating: bool = False) -> Iterator[UnshardedParameters | None]:
        """Gather a unit's parameters for its forward pass; `evaluating` if no backward pass follows.

        Yields:
            The gathered parameters, if they stay for the backward pass; None otherwise.
        """
        with _INSIDE if self._running else self._pass(self._forward_order, backward=False, evaluating=evaluating):
            if self._in_backward:
                self._recomputed.add(unit)
            else:
                self._entered.append(unit)
            unsharded = self._unshard(unit)
            unsharded.use_unsharded(backward=False)
            try:
                yield unsharded if self._stays(unit) else None
            finally:
                unsharded.use_shards()
            if not self._in_backward:
                self._left.append(unit)

    @contextmanager
    def backward(
        self, unit: FlatParameterGroup, unsharded: UnshardedParameters | None, *, sync: bool
    ) -> Iterator[None]:
        """Gather a unit's parameters for its backward pass, and then reduce its gradients."""
        with _INSIDE if self._running else self._pass(self._backward_order, backward=True):
            self._backward_syncs = sync
            self._finish_sending(unit)
            if unsharded is None:
                unsharded = self._unshard(unit)
            elif self._prefetched is None:
                self._prefetch_after(unit)
            unsharded.use_unsharded(backward=True, may_defer=not sync)
            try:
                yield
            finally:
                unsharded.use_shards()
            del unsharded
            if sync:
                self._reduce(unit)

    def reduce_all(self) -> None:
        """Reduce all accumulated gradients; return when they are reduced."""
        with _INSIDE if self._running else self._pass((), backward=True):
            if self.announcer is None:
                accumulated = units_to_reduce(self.units, self._config)
            else:  # ranks without batches know of announced operations only
                accumulated = [unit for unit in self.units if unit.has_unsharded_grad]
            for unit in accumulated:
                self._reduce(unit)

    def check(self) -> None:
        """Check that a pass may run.

        Raises:
            UsageError: an earlier backward pass failed.
        """
        if self._failed:
            raise UsageError(
                "FSDP: an earlier backward pass failed on this rank, while other ranks may have "
                "gone on: their gradients no longer belong together. Find its error, and restart "
                "from a checkpoint."
            )

    def note_step(self, lr: float) -> None:
        """Note a step of an optimizer, which ranks compare in the next backward pass; those in `join` are announced."""
        if not self._config.check_replicas or self.announcer is not None:
            return
        if any(any(flat.has_grad) for unit in self.units for flat in unit.trained):
            self._steps.append(lr)

    # -- operations that are announced, so that ranks without batches take part ------------------

    def launch_gather(self, unit: FlatParameterGroup) -> UnshardedParameters:
        """Start to gather a unit."""
        shared = unit.flat_parameters and self._config.shard_group is not None
        if self.announcer is not None and shared:
            self.announcer.announce_gather(unit)
        # Ranks that have left a join do not know whether a pass is followed by a backward pass.
        return unit.unshard(evaluating=self._evaluating and self.announcer is None, at_once=self._at_once)

    def launch_reduction(self, unit: FlatParameterGroup) -> None:
        """Advance older reductions by a step, and start to reduce a unit's gradients."""
        if self.announcer is not None:
            self.announcer.announce_reduction(unit)
        self._advance()
        self._start_agreement()
        scale = 1.0 if self.announcer is None else self.announcer.scale
        if self._backward_agreement is None:
            steps, self._steps = self._steps, []
            self._backward_agreement = BackwardAgreement(self.units, self._config, steps, at_once=self._at_once)
        self._backward_agreement.record(unit)
        for flat in unit.trained:
            self._reductions.append(GradientReduction(flat, self._config, scale, at_once=self._at_once))

    def drain(self) -> list[FlatParameterGroup]:
        """Wait until every reduction has ended, and drop the gradients of parameters that no rank used.

        Returns:
            The units of which a rank has gradients of earlier passes, which are to be reduced, too.

        Raises:
            UsageError: ranks reduced different units; raised on every rank.
        """
        agreement, self._backward_agreement = self._backward_agreement, None
        if agreement is None:
            return []
        if self.announcer is not None:
            self.announcer.announce_drain()
        agreement.start()
        self._reductions.append(agreement)
        while self._reductions:
            self._advance()
        agreement.finish()
        return agreement.left

    def check_replicas(self) -> None:
        """Raise an error if the checksums that were sent with the last reductions differed.

        Raises:
            UsageError: replicas are no longer equal; raised on every rank.
        """
        agreement, self._agreement = self._agreement, None
        if agreement is None or agreement.equal:
            return
        assert self._config.replica_group is not None
        named = [
            (span.name, view)
            for unit in self.units
            for flat in unit.flat_parameters
            for span, view in zip(flat.layout.spans, flat.shard_views, strict=True)
        ]
        raise replicas_error("FSDP", self._config.replica_group, named, shards=self._config.shard_group)

    # -- inside ----------------------------------------------------------------------------------

    @contextmanager
    def _pass(self, order: Sequence[FlatParameterGroup], *, backward: bool, evaluating: bool = False) -> Iterator[None]:
        self._running, self._in_backward, self._evaluating = True, backward, evaluating
        self._order, self._position = order, 0
        try:
            yield
            if backward:
                for unit in self.drain():  # used in `no_sync` only
                    self._reduce(unit)
                self.drain()
            else:
                self._predict(self._entered, self._left[::-1])
            self._drop_prefetched()
        except BaseException:
            self._failed = self._failed or backward
            self._agreement = self._backward_agreement = None
            raise
        finally:
            # After an error this does not wait for operations, which the other ranks may never join.
            self._prefetched = None
            self._reductions.clear()
            self._entered, self._left = [], []
            self._running = self._in_backward = False
        self.check_replicas()

    def _unshard(self, unit: FlatParameterGroup) -> UnshardedParameters:
        """Use the prefetched unit, or gather; start to prefetch the next before waiting."""
        if self._prefetched is not None and self._prefetched[0] is unit:
            unsharded = self._prefetched[1]
            self._prefetched = None
        else:
            self._drop_prefetched()
            unsharded = self.launch_gather(unit)
        self._prefetch_after(unit)
        unsharded.wait()
        return unsharded

    def _stays(self, unit: FlatParameterGroup) -> bool:
        """Return True if parameters gathered for the forward pass stay for the backward pass."""
        # A unit that is recomputed during a backward pass runs its own backward pass at once.
        return self._config.keeps_until_backward or self._in_backward or unit in self._staying

    def _predict(self, forward: Sequence[FlatParameterGroup], backward: Sequence[FlatParameterGroup]) -> None:
        """Set the expected order of the forward and the backward pass, and the units that stay in between."""
        self._forward_order, self._backward_order = forward, backward
        first = list(dict.fromkeys(unit for unit in backward if unit.flat_parameters))
        self._staying = {*first[: 1 + self._config.prefetch]} - self._recomputed

    def _prefetch_after(self, unit: FlatParameterGroup) -> None:
        pointless = self._config.keeps_until_backward and self._in_backward
        if not self._config.prefetch or self._config.shard_group is None or pointless:
            return
        try:
            self._position = self._order.index(unit, self._position) + 1
        except ValueError:
            return
        if self._position < len(self._order):
            following = self._order[self._position]
            stayed = self._in_backward and following in self._staying
            if following is not unit and not following.is_unsharded and not stayed:
                self._prefetched = following, self.launch_gather(following)

    def _start_agreement(self) -> None:
        """Let the ranks compare their shards, once for all reductions that are waited for together."""
        if self._replica_check is None or not self._config.check_replicas or self._agreement is not None:
            return
        assert self._config.replica_group is not None
        shards = [flat.shard for unit in self.units for flat in unit.flat_parameters]
        digest = self._replica_check.digest(shards)
        self._agreement = ReplicaAgreement(digest, self._config.shard_group, self._config.replica_group)
        self._reductions.append(self._agreement)

    def _drop_prefetched(self) -> None:
        if self._prefetched is not None:
            self._prefetched[1].wait()
            self._prefetched = None

    def _finish_sending(self, unit: FlatParameterGroup) -> None:
        """Wait for reductions that still read the memory to which this pass will add gradients."""
        if self._config.keeps_unsharded:
            while any(item.flat in unit.trained for item in self._reductions if isinstance(item, GradientReduction)):
                self._advance()

    def _reduce(self, unit: FlatParameterGroup) -> None:
        if unit.trained:
            self.launch_reduction(unit)

    def _advance(self) -> None:
        for _ in range(len(self._reductions)):
            reduction = self._reductions.popleft()
            if not reduction.advance():
                self._reductions.append(reduction)


def _runs_at_once(units: Sequence[FlatParameterGroup], config: FSDPConfig) -> bool:
    """Say whether operations run in the caller's thread; those of a device run in a queue of its own."""
    flat_parameters = [flat for unit in units for flat in unit.flat_parameters]
    if any(flat.namespace is not np for flat in flat_parameters):
        return False
    are_small = all(flat.largest_message_bytes <= _AT_ONCE_BYTES for flat in flat_parameters)
    return are_small or not all(map(has_spare_core, config.groups))
