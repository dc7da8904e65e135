"""FSDPJoin: ranks that have run out of batches go on sending and updating their shards.

A rank owns its shards of the parameters and of the optimizer's state, so the other ranks need it until the end. They
announce every operation beforehand, on process groups used for nothing else, because operations launched earlier
continue in the background. A rank that has left the `join` block answers each announcement:

    GATHER  unit      it sends its shards
    REDUCE  unit      it contributes zeros, and gets its shard of the sum as all ranks do
    DRAIN             it waits for the reductions
    CLIP    norm      it takes part in the norm, and scales its shards
    UNSCALE           it unscales its shards of the gradients
    AGREE             it tells whether these gradients are finite
    STEP    lr        it updates its shards

`zero_grad` communicates nothing and is not announced. Instead REDUCE, UNSCALE and STEP tell which
parameters had a gradient.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array
from ..nn.parameter import Parameter
from ..optim import LossScaler, Optimizer
from ..uneven_inputs import JOINED, UnevenInputs
from .config import FSDPConfig
from .flat_parameter_group import FlatParameterGroup, UnshardedParameters
from .unit_scheduler import UnitScheduler

_NUMBER_BYTES = 8
_MAX_GATHERS = 2


class _Operation(enum.IntEnum):
    GATHER = 0
    REDUCE = 1
    DRAIN = 2
    CLIP = 3
    STEP = 4
    UNSCALE = 5
    AGREE = 6


class FSDPJoin:
    """One `join` block, on one rank.

    Args:
        scheduler: the module's scheduler.
        parameters: the module's parameters.
        groups: the groups for announcements, which together connect all ranks.
        optimizers: the optimizers that step inside the block.
        clip: scales this rank's gradients, together with the others.
        scaler: the loss scaler that steps the optimizers, if any.
        divide_by_all: divide by the number of all ranks instead of the number of contributing ranks.
    """

    def __init__(
        self,
        scheduler: UnitScheduler,
        parameters: Sequence[Parameter],
        groups: Sequence[ProcessGroup],
        optimizers: Sequence[Optimizer],
        clip: Callable[[float], object],
        *,
        scaler: LossScaler | None,
        divide_by_all: bool,
    ) -> None:
        self._scheduler = scheduler
        self._parameters = parameters
        self._optimizers = optimizers
        self._clip = clip
        self._scaler = scaler
        self._divide_by_all = divide_by_all
        self._num_indices = max(len(scheduler.units), len(optimizers), 1)
        flag_counts = [len(parameters), len(optimizers), *(len(optimizer.parameters) for optimizer in optimizers)]
        self._note_bytes = _NUMBER_BYTES + max(flag_counts)
        self._inputs = UnevenInputs("FSDP", groups, self._describe, self._note_bytes)
        self._shadowing = False

    @property
    def scale(self) -> float:
        """The factor that turns a mean over all ranks into the mean over the contributing ranks."""
        if self._divide_by_all:
            return 1.0
        return self._inputs.world_size / len(self._inputs.active)

    # -- announcements of active ranks -----------------------------------------------------------

    def announce_gather(self, unit: FlatParameterGroup) -> None:
        """Announce that a unit is gathered."""
        self._announce(_Operation.GATHER, unit.index)

    def announce_reduction(self, unit: FlatParameterGroup) -> None:
        """Announce that a unit's gradients are reduced, and which of them are added to earlier gradients."""
        flags = [flag for flat in unit.trained for flag in flat.has_grad]
        self._announce(_Operation.REDUCE, unit.index, flags=flags)

    def announce_drain(self) -> None:
        """Announce that all reductions are waited for."""
        self._announce(_Operation.DRAIN, 0)

    def announce_clip(self, max_norm: float) -> None:
        """Announce that gradients are clipped."""
        self._announce(_Operation.CLIP, 0, number=max_norm)

    def announce_step(self, index: int) -> None:
        """Announce a step of an optimizer, and which parameters have a gradient."""
        optimizer = self._optimizers[index]
        flags = _grad_flags(optimizer.parameters)
        self._announce(_Operation.STEP, index, number=optimizer.lr, flags=flags)

    def before_unscale(self, optimizer: Optimizer) -> None:
        """Announce that an optimizer's gradients are unscaled, and which parameters have one."""
        flags = _grad_flags(optimizer.parameters)
        self._announce(_Operation.UNSCALE, self._index_of(optimizer), flags=flags)

    def before_agree(self, optimizers: Sequence[Optimizer]) -> None:
        """Announce that ranks agree on whether optimizers step."""
        flags = [False] * len(self._optimizers)
        for optimizer in optimizers:
            flags[self._index_of(optimizer)] = True
        self._announce(_Operation.AGREE, 0, flags=flags)

    def _index_of(self, optimizer: Optimizer) -> int:
        for index, known in enumerate(self._optimizers):
            if known is optimizer:
                return index
        raise UsageError(
            f"FSDP.join: the {type(optimizer).__name__} that is to step by the scaler was not "
            "given to join(), so ranks that have left could not step with it."
        )

    def _announce(self, operation: _Operation, index: int, *, number: float = 0.0, flags: Sequence[bool] = ()) -> None:
        if self._shadowing:
            return
        note = np.zeros(self._note_bytes, np.uint8)
        note[:_NUMBER_BYTES].view(np.float64)[0] = number
        note[_NUMBER_BYTES : _NUMBER_BYTES + len(flags)] = flags
        self._inputs.announce(1 + operation * self._num_indices + index, note)

    # -- operations of ranks without batches ------------------------------------------------------

    def finish(self, config: FSDPConfig, buffers: Iterable[Array]) -> None:
        """Take part in the operations of the active ranks to the end; then copy the buffers of one of the last.

        A gradient that is absent on that rank becomes absent here.

        Raises:
            UsageError: see `FSDP.join`.
        """
        if any(unit.has_unsharded_grad for unit in self._scheduler.units):
            raise UsageError(
                "FSDP.join: this rank leaves with gradients that no_sync() has accumulated and "
                "nobody has reduced. Make the last pass of a step outside no_sync()."
            )
        self._shadow()
        roots = self._inputs.roots()
        flags = np.array(_grad_flags(self._parameters), np.uint8)
        config.broadcast([flags], roots)
        config.broadcast(buffers, roots)
        _drop_grads(self._parameters, flags.tolist())
        self._scheduler.reset_order()

    def _shadow(self) -> None:
        """Take part in the active ranks' operations until no rank has a batch."""
        self._shadowing = True
        gathers: deque[UnshardedParameters] = deque()
        while True:
            step, note = self._inputs.announce(JOINED)
            if step == JOINED:
                break
            self._take_part(*divmod(step - 1, self._num_indices), note, gathers)
        for unsharded in gathers:
            unsharded.wait()

    def _take_part(self, operation: int, index: int, note: Array, gathers: deque[UnshardedParameters]) -> None:
        number = float(note[:_NUMBER_BYTES].view(np.float64)[0])
        flags = note[_NUMBER_BYTES:].astype(bool).tolist()
        match _Operation(operation):
            case _Operation.GATHER:
                gathers.append(self._scheduler.units[index].unshard())
                if len(gathers) > _MAX_GATHERS:
                    gathers.popleft().wait()
            case _Operation.REDUCE:
                unit = self._scheduler.units[index]
                for flat in unit.trained:
                    _drop_grads(flat.parameters, flags)
                    flags = flags[len(flat.parameters) :]
                self._scheduler.launch_reduction(unit)
            case _Operation.DRAIN:
                self._scheduler.drain()
                self._scheduler.check_replicas()
            case _Operation.CLIP:
                self._clip(number)
            case _Operation.STEP:
                optimizer = self._optimizers[index]
                _drop_grads(optimizer.parameters, flags)
                optimizer.lr = number
                optimizer.step()
            case _Operation.UNSCALE:
                _drop_grads(self._optimizers[index].parameters, flags)
                self._require_scaler().unscale(self._optimizers[index])
            case _Operation.AGREE:
                chosen = zip(self._optimizers, flags, strict=False)
                self._require_scaler().agree([optimizer for optimizer, flag in chosen if flag])

    def _require_scaler(self) -> LossScaler:
        if self._scaler is None:
            raise UsageError(
                "FSDP.join: other ranks step by a LossScaler, and this one was given none. Say "
                "model.join(optimizer, scaler=scaler) on every rank."
            )
        return self._scaler

    def _describe(self, step: int) -> str:
        number, index = divmod(step - 1, self._num_indices)
        operation = _Operation(number)
        if operation in (_Operation.GATHER, _Operation.REDUCE):
            return f"{operation.name} of {self._scheduler.units[index].name or 'the root unit'!r}"
        return operation.name


def _grad_flags(parameters: Sequence[Parameter]) -> list[bool]:
    return [parameter.grad is not None for parameter in parameters]


def _drop_grads(parameters: Sequence[Parameter], flags: Sequence[bool]) -> None:
    """Drop the gradients that active ranks do not have; `flags` beyond the parameters are ignored."""
    for parameter, flag in zip(parameters, flags, strict=False):
        if not flag:
            parameter.zero_grad()
