"""BackwardAgreement: which parameters got gradients in a backward pass, and whether all ranks ran the same.

A unit's gradients are reduced together, so a parameter that no rank used gets zeros, by which an optimizer would go on
to change it (momentum, weight decay). The gradient of such a parameter is dropped, for in one process it has none.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from ferro import UsageError, Work

from ..nn.arrays import Array
from ..replica_check import ReplicaCheck
from .buffer_pool import to_namespace
from .config import FSDPConfig
from .flat_parameter import FlatParameter
from .flat_parameter_group import FlatParameterGroup


class BackwardAgreement:
    """One small message, of the greatest bytes, in the background, behind the reductions of a backward pass.

    It holds a checksum of the units in the order in which they were reduced and of the optimizers' steps before, a flag
    for each unit that still has gradients of earlier passes in `no_sync`, and a flag for each trained parameter that
    has a gradient.

    Args:
        units: all units.
        config: the settings of the FSDP module.
        steps: the learning rates of the optimizers' steps since the last backward pass. Shards that were updated with
            different ones would not show it.
        at_once: whether the message is sent in the caller's thread.

    Attributes:
        left: the units that have such gradients on any rank, after `finish`.
    """

    def __init__(
        self, units: Sequence[FlatParameterGroup], config: FSDPConfig, steps: Sequence[float], *, at_once: bool
    ) -> None:
        self.left: list[FlatParameterGroup] = []
        self._units = units
        self._config = config
        self._steps = steps
        self._at_once = at_once
        self._trained = [flat for unit in units for flat in unit.trained]
        self._reduced: list[FlatParameterGroup] = []
        self._flags: dict[FlatParameter, list[bool]] = {}
        self._groups = list(config.groups)
        self._message: Array = np.empty(0, np.uint8)
        self._work: Work[object] | None = None

    def record(self, unit: FlatParameterGroup) -> None:
        """Note which gradients there are, just before a unit's gradients are reduced."""
        self._reduced.append(unit)
        for flat in unit.trained:
            before = self._flags.get(flat) or flat.has_grad
            added = flat.unsharded_grad.present
            self._flags[flat] = [was or is_set for was, is_set in zip(before, added, strict=True)]

    def start(self) -> None:
        """Send the message; all reductions of the pass have been started."""
        # Single precision: schedules on unlike processors may differ in a rate's last bit.
        order = np.array([unit.index for unit in self._reduced] + [-1, *self._steps], np.float32)
        flags = [flag for flat in self._trained for flag in self._flags.get(flat, [False] * len(flat.parameters))]
        left = [unit.has_unsharded_grad for unit in self._units]
        message = np.concatenate([ReplicaCheck.to_bytes(zlib.crc32(order.data)), np.array(left + flags, np.uint8)])
        self._message = to_namespace(message, self._trained[0].namespace)
        self.advance()

    def advance(self) -> bool:
        """Wait for the step under way and start the next one; return True if there is none."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if not self._groups:
            return True
        group = self._groups.pop(0)
        if self._at_once:
            group.all_reduce(self._message, "max", out=self._message)
        else:
            self._work = group.all_reduce(self._message, "max", out=self._message, async_op=True)
        return False

    def finish(self) -> None:
        """Drop the gradients that no rank has, once `advance` has returned True.

        Raises:
            UsageError: ranks reduced different units, or optimizers stepped differently before; raised on every rank.
        """
        message = to_namespace(self._message, np)
        num_flags = len(self._units) + sum(len(flat.parameters) for flat in self._trained)
        head, flags = np.split(message, [message.size - num_flags])
        if not ReplicaCheck.agree_bytes(head):
            raise self._error()
        self.left = [unit for unit, flag in zip(self._units, flags.tolist(), strict=False) if flag]
        flags = flags[len(self._units) :]
        for flat in self._trained:
            own, flags = flags[: len(flat.parameters)], flags[len(flat.parameters) :]
            if flat not in self._flags:
                continue
            for parameter, flag in zip(flat.parameters, own.tolist(), strict=True):
                if not flag:
                    parameter.zero_grad()

    def _error(self) -> UsageError:
        units = ", ".join(unit.name or "the root unit" for unit in self._reduced)
        steps = ", ".join(f"lr {lr:g}" for lr in self._steps) or "none"
        found = ""
        for group in self._config.groups:
            by_rank: list[tuple[str, str]] = group.all_gather_object((units, steps))
            for at, what in enumerate(("units", "steps of optimizers")):
                each = [described[at] for described in by_rank]
                if not found and len(set(each)) > 1:
                    found = f"{what} on group {group.name!r}: " + "; ".join(
                        f"rank {r}: {x}" for r, x in enumerate(each)
                    )
        return UsageError(
            "FSDP: the ranks ran different units in this backward pass, or different steps of optimizers before it, so "
            f"that gradients or shards do not belong together ({found or 'on ranks of another group'}). All ranks run "
            "the same units, and step together with the same learning rate. For branches that differ between ranks, "
            "make one unit of the module that chooses (`units=`). Start again from a saved state."
        )


def units_to_reduce(units: Sequence[FlatParameterGroup], config: FSDPConfig) -> list[FlatParameterGroup]:
    """Return the units of which any rank has gradients that are not reduced; all ranks call it."""
    namespaces: list[ModuleType] = [flat.namespace for unit in units for flat in unit.trained]
    if not namespaces:
        return []
    message = to_namespace(np.array([unit.has_unsharded_grad for unit in units], np.uint8), namespaces[0])
    for group in config.groups:
        group.all_reduce(message, "max", out=message)
    return [unit for unit, flag in zip(units, to_namespace(message, np).tolist(), strict=True) if flag]
