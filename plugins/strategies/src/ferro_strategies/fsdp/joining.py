"""Joining: how ranks without batches go on giving their pieces, and keep them up to date.

A rank owns its pieces of the parameters and of the optimizer's state, so the others cannot do
without it. Whatever they do together they announce by a roll call, on groups of its own: what
has been launched goes on in the background meanwhile. A rank that has left the block answers:

    GATHER  unit      it gives its pieces
    REDUCE  unit      it gives zeros, and gets its piece of the sum like everyone
    DRAIN             it waits for the reductions
    CLIP    norm      it takes part in the norm, and scales its pieces
    UNSCALE           it unscales its pieces of the gradients
    AGREE             it says whether these are finite
    STEP    lr        it updates its pieces

`zero_grad` communicates nothing and so is not announced. Instead REDUCE, UNSCALE and STEP tell
which parameters had a gradient.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array
from ..nn.parameter import Parameter
from ..optim import LossScaler, Optimizer
from ..uneven_inputs import JOINED, UnevenInputs
from .gathered import Gathered, Shards
from .plan import Plan

if TYPE_CHECKING:
    from .passes import Passes

_NUMBER_BYTES = 8
_GATHERS_AT_ONCE = 2


class _Event(enum.IntEnum):
    GATHER = 0
    REDUCE = 1
    DRAIN = 2
    CLIP = 3
    STEP = 4
    UNSCALE = 5
    AGREE = 6


class Joining:
    """One `join` block, on one rank.

    Args:
        passes: of the module.
        parameters: the module's.
        groups: for the roll call; their product is all ranks.
        optimizers: which step inside the block.
        clip: scales this rank's pieces, together with the others.
        scaler: by which they step, if any.
        divide_by_all: divide by the number of all ranks instead of those that contribute.
    """

    def __init__(
        self,
        passes: Passes,
        parameters: Sequence[Parameter],
        groups: Sequence[ProcessGroup],
        optimizers: Sequence[Optimizer],
        clip: Callable[[float], object],
        *,
        scaler: LossScaler | None,
        divide_by_all: bool,
    ) -> None:
        self._passes = passes
        self._parameters = parameters
        self._optimizers = optimizers
        self._clip = clip
        self._scaler = scaler
        self._divide_by_all = divide_by_all
        self._width = max(len(passes.units), len(optimizers), 1)
        held = [
            len(parameters),
            len(optimizers),
            *(len(optimizer.parameters) for optimizer in optimizers),
        ]
        self._note_bytes = _NUMBER_BYTES + max(held)
        self._roll = UnevenInputs("FSDP", groups, self._describe, self._note_bytes)
        self._shadowing = False

    @property
    def scale(self) -> float:
        """By what a mean over all ranks is multiplied to be that over those that contribute."""
        if self._divide_by_all:
            return 1.0
        return self._roll.world_size / len(self._roll.active)

    # -- what active ranks tell -------------------------------------------------------------------

    def tell_gather(self, unit: Shards) -> None:
        """Announce that a unit is gathered."""
        self._tell(_Event.GATHER, unit.index)

    def tell_reduction(self, unit: Shards) -> None:
        """Announce that a unit's gradients are reduced, and which are added to earlier ones."""
        flags = [flag for flat in unit.trained for flag in flat.has_grad]
        self._tell(_Event.REDUCE, unit.index, flags=flags)

    def tell_drain(self) -> None:
        """Announce that all reductions are waited for."""
        self._tell(_Event.DRAIN, 0)

    def tell_clip(self, max_norm: float) -> None:
        """Announce that gradients are clipped."""
        self._tell(_Event.CLIP, 0, number=max_norm)

    def tell_step(self, index: int) -> None:
        """Announce a step of an optimizer, and which parameters have a gradient."""
        optimizer = self._optimizers[index]
        flags = [parameter.grad is not None for parameter in optimizer.parameters]
        self._tell(_Event.STEP, index, number=optimizer.lr, flags=flags)

    def before_unscale(self, optimizer: Optimizer) -> None:
        """Announce that an optimizer's gradients are unscaled, and which there are."""
        flags = [parameter.grad is not None for parameter in optimizer.parameters]
        self._tell(_Event.UNSCALE, self._index_of(optimizer), flags=flags)

    def before_agree(self, optimizers: Sequence[Optimizer]) -> None:
        """Announce that ranks agree on whether optimizers step."""
        flags = [False] * len(self._optimizers)
        for optimizer in optimizers:
            flags[self._index_of(optimizer)] = True
        self._tell(_Event.AGREE, 0, flags=flags)

    def _index_of(self, optimizer: Optimizer) -> int:
        for index, known in enumerate(self._optimizers):
            if known is optimizer:
                return index
        raise UsageError(
            f"FSDP.join: the {type(optimizer).__name__} that is to step by the scaler was not "
            "given to join(), so ranks that have left could not step with it."
        )

    def _tell(
        self, event: _Event, index: int, *, number: float = 0.0, flags: Sequence[bool] = ()
    ) -> None:
        if self._shadowing:
            return
        note = np.zeros(self._note_bytes, np.uint8)
        note[:_NUMBER_BYTES].view(np.float64)[0] = number
        note[_NUMBER_BYTES : _NUMBER_BYTES + len(flags)] = flags
        self._roll.announce(1 + event * self._width + index, note)

    # -- what the others do ----------------------------------------------------------------------

    def finish(self, plan: Plan, buffers: Iterable[Array]) -> None:
        """Shadow the others; then have the buffers of one that was last, and its lack of gradients.

        Raises:
            UsageError: see `FSDP.join`.
        """
        if any(unit.has_added for unit in self._passes.units):
            raise UsageError(
                "FSDP.join: this rank leaves with gradients that no_sync() has accumulated and "
                "nobody has reduced. Make the last pass of a step outside no_sync()."
            )
        self._shadow()
        roots = self._roll.roots()
        flags = np.array([parameter.grad is not None for parameter in self._parameters], np.uint8)
        plan.broadcast([flags], roots)
        plan.broadcast(buffers, roots)
        for parameter, flag in zip(self._parameters, flags, strict=True):
            if not flag:
                parameter.zero_grad()
        self._passes.forget_routes()

    def _shadow(self) -> None:
        """Take part in the others' steps until nobody has a batch."""
        self._shadowing = True
        recent: deque[Gathered] = deque()
        while True:
            step, note = self._roll.announce(JOINED)
            if step == JOINED:
                break
            self._follow(*divmod(step - 1, self._width), note, recent)
        for gathered in recent:
            gathered.wait()

    def _follow(self, event: int, index: int, note: Array, recent: deque[Gathered]) -> None:
        number = float(note[:_NUMBER_BYTES].view(np.float64)[0])
        flags = note[_NUMBER_BYTES:].astype(bool).tolist()
        match _Event(event):
            case _Event.GATHER:
                recent.append(self._passes.units[index].launch())
                if len(recent) > _GATHERS_AT_ONCE:
                    recent.popleft().wait()
            case _Event.REDUCE:
                unit = self._passes.units[index]
                for flat in unit.trained:
                    flat.forget_grads(flags[: len(flat.members)])
                    flags = flags[len(flat.members) :]
                self._passes.launch_reduction(unit)
            case _Event.DRAIN:
                self._passes.drain()
            case _Event.CLIP:
                self._clip(number)
            case _Event.STEP:
                optimizer = self._optimizers[index]
                _forget_grads(optimizer, flags)
                optimizer.lr = number
                optimizer.step()
            case _Event.UNSCALE:
                _forget_grads(self._optimizers[index], flags)
                self._known_scaler().unscale(self._optimizers[index])
            case _Event.AGREE:
                chosen = zip(self._optimizers, flags, strict=False)
                self._known_scaler().agree([optimizer for optimizer, flag in chosen if flag])

    def _known_scaler(self) -> LossScaler:
        if self._scaler is None:
            raise UsageError(
                "FSDP.join: other ranks step by a LossScaler, and this one was given none. Say "
                "model.join(optimizer, scaler=scaler) on every rank."
            )
        return self._scaler

    def _describe(self, step: int) -> str:
        event, index = divmod(step - 1, self._width)
        if event in (_Event.GATHER, _Event.REDUCE):
            return f"{_Event(event).name} of {self._passes.units[index].name or 'the root unit'!r}"
        return _Event(event).name


def _forget_grads(optimizer: Optimizer, flags: Sequence[bool]) -> None:
    """Drop the gradients that other ranks' optimizers do not have."""
    for parameter, flag in zip(optimizer.parameters, flags, strict=False):
        if not flag:
            parameter.zero_grad()
