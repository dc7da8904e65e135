"""Data-parallel stages: the reduction of a step's gradients over replicas, and the mean over all replicas' targets.

DDP and FSDP average gradients over replicas. If a loss function returns weights (see `loss`), replicas have different
sums of weights, and the mean over all targets of all replicas is wanted. So before the reduction each replica
multiplies its gradients by

    reference * replicas / sum of the weights of all replicas

where reference is the number by which this replica's weights were divided on the way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol, runtime_checkable

import numpy as np

from ferro import ProcessGroup

from ...nn.arrays import Array
from ...nn.batchnorm import BatchNorm, deferring_statistics
from ...nn.module import Module, TreeSnapshot
from ...nn.parameter import Parameter
from .loss import LossTotals


@runtime_checkable
class DataParallelModule(Protocol):
    """The methods of DDP and FSDP that reduce the gradients of several passes at once."""

    @property
    def averaging_groups(self) -> tuple[ProcessGroup, ...]:
        """The groups over which gradients are averaged, one after the other."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients, without reducing them."""

    def sync_gradients(self) -> None:
        """Reduce the accumulated gradients."""


@runtime_checkable
class ReplicatedBuffers(Protocol):
    """The method of DDP that makes buffers equal before a step."""

    def sync_buffers(self) -> None:
        """Give the first rank's buffers to all ranks."""


@runtime_checkable
class ShardedGradients(Protocol):
    """The method of FSDP that changes gradients which it keeps apart until they are reduced."""

    def scale_unreduced_gradients(self, factor: float) -> None:
        """Multiply the accumulated gradients by a factor."""


class StageModules:
    """The modules and parameters of this rank's stages that a step treats in a special way.

    They are looked up again when a stage's tree of modules has changed.

    Args:
        stages: this rank's stages.

    Attributes:
        placeholder: an empty parameter, for optimizers on a rank that has nothing to train.
        data_parallel: the DDP and FSDP modules.
    """

    def __init__(self, stages: Sequence[Module]) -> None:
        self.placeholder = Parameter(np.zeros(0, np.float32), name="(nothing to train)")
        self._stages = stages
        self._look_up()

    def refresh(self) -> None:
        """Look up modules and parameters again if a stage has changed."""
        if not all(snapshot.is_current() for snapshot in self._snapshots):
            self._look_up()

    @property
    def averaging_groups(self) -> tuple[ProcessGroup, ...]:
        """The groups over which this rank's gradients are averaged; () without data-parallel modules."""
        return self.data_parallel[0].averaging_groups if self.data_parallel else ()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Reduce no gradients inside the block, and update running statistics once, at its end."""
        with ExitStack() as stack:
            stack.enter_context(deferring_statistics(self._norms))
            for module in self.data_parallel:
                stack.enter_context(module.no_sync())
            yield

    def sync_buffers(self) -> None:
        """Give the buffers of DDP modules the values of the first replica."""
        for module in self._with_buffers:
            module.sync_buffers()

    def sync_gradients(self) -> None:
        """Average the accumulated gradients over replicas."""
        for module in self.data_parallel:
            module.sync_gradients()

    def copy_gradients(self) -> list[tuple[Parameter, Array | None]]:
        """Copy the gradients of all parameters that add up in `grad`, to tell new gradients from them later."""
        return [(item, None if item.grad is None else item.grad.copy()) for item in self._unsharded]

    def scale_gradients(self, factor: float, before: Iterable[tuple[Parameter, Array | None]]) -> None:
        """Multiply the gradients that a step has added by a factor.

        Args:
            factor: the factor.
            before: the gradients before the step, from `copy_gradients`.
        """
        if factor == 1.0:
            return
        for parameter, old in before:
            grad = parameter.grad
            if grad is None:
                continue
            if old is None:
                grad *= factor
            else:
                grad += (grad - old) * (factor - 1.0)
        for module in self._sharded:
            module.scale_unreduced_gradients(factor)

    def _look_up(self) -> None:
        modules = [module for stage in self._stages for module in stage.modules()]
        self._snapshots = [TreeSnapshot(stage) for stage in self._stages]
        self.data_parallel = [module for module in modules if isinstance(module, DataParallelModule)]
        self._with_buffers = [module for module in modules if isinstance(module, ReplicatedBuffers)]
        self._sharded = [module for module in modules if isinstance(module, ShardedGradients)]
        self._norms = [module for module in modules if isinstance(module, BatchNorm)]
        sharded = {id(p) for m in self._sharded if isinstance(m, Module) for p in m.parameters()}
        parameters = {id(p): p for stage in self._stages for p in stage.parameters()}
        self._unsharded = [p for key, p in parameters.items() if key not in sharded]


def total_over_replicas(
    totals: LossTotals, group: ProcessGroup, averaging_groups: Sequence[ProcessGroup], has_replicas: Sequence[bool]
) -> tuple[LossTotals, float]:
    """Sum up the loss of all replicas of a pipeline; return the sum, and the factor for this rank's new gradients.

    Args:
        totals: the loss of this pipeline, the same on all its ranks.
        group: the pipeline's ranks.
        averaging_groups: the groups over which this rank's gradients are averaged.
        has_replicas: for each rank of the pipeline, whether it has such groups.
    """
    names = sorted(totals.metrics)
    row = np.array([totals.loss, totals.weight, 1.0, *(totals.metrics[name] for name in names)])
    for averaging in averaging_groups:
        row = averaging.all_reduce(row)
    if any(has_replicas) and not all(has_replicas):
        row = group.broadcast(row, has_replicas.index(True))
    loss, weight, replicas, *metrics = map(float, row)
    whole = LossTotals(
        loss=loss, weight=weight, reference=totals.reference, metrics=dict(zip(names, metrics, strict=True))
    )
    return whole, totals.reference * replicas / weight if weight else 1.0
