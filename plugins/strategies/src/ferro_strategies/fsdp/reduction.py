"""GradientReduction: from the ranks' unsharded gradients to the mean, in shards.

    unsharded --reduce_scatter over shards--> shard --all_reduce over replicas--> added to `grad`

A step is left out where there is no such group. Both steps run in the background. All ranks call `advance` at the same
places, so the steps of several reductions have the same order on all ranks.
"""

from __future__ import annotations

from ferro import ProcessGroup, Work

from ..nn.arrays import quiet_overflow
from .buffer_pool import PooledBuffer
from .config import FSDPConfig
from .flat_parameter import FlatParameter


class GradientReduction:
    """One reduction under way; the constructor starts it.

    Args:
        flat: the flat parameter. No gradient may be added to it until the first step has ended.
        config: the settings of the FSDP module.
        scale: a factor for the mean over all ranks.
        at_once: whether each step runs in the caller's thread, where it is started.

    Attributes:
        flat: as given.
    """

    def __init__(self, flat: FlatParameter, config: FSDPConfig, scale: float, *, at_once: bool) -> None:
        self.flat = flat
        self._config = config
        self._scale = scale
        self._at_once = at_once
        self._work: Work[object] | None = None
        unsharded = _in_reduce_dtype(flat.unsharded_grad.take(), flat, config)
        self._shard = unsharded
        self._scattered = config.shard_group is None
        self._sent: PooledBuffer | None = None
        if config.shard_group is not None:
            self._shard = flat.allocate_reduced()
            self._sent = unsharded
            if at_once:
                self._reduce_scatter_at_once(config.shard_group, unsharded)
                return
            self._work = config.shard_group.reduce_scatter(
                unsharded.array, "mean", out=self._shard.array, async_op=True, copy=False
            )
            if not flat.unsharded_grad.still_uses(unsharded):
                config.pool.mark_draining(unsharded)
        else:
            self._all_reduce()

    def advance(self) -> bool:
        """Wait for the step under way and start the next one; return True if there is none."""
        if self._work is not None:
            try:
                self._work.wait()
            except BaseException:
                self._abandon()
                raise
            self._work = self._sent = None
        if not self._scattered and self._config.replica_group is not None:
            self._scattered = True
            self._all_reduce()
            return False
        if self._scale != 1:
            array = self._shard.array
            array *= array.dtype.type(self._scale)
        self.flat.accumulate_reduced(self._shard.array)
        return True

    def _reduce_scatter_at_once(self, group: ProcessGroup, unsharded: PooledBuffer) -> None:
        try:
            group.reduce_scatter(unsharded.array, "mean", out=self._shard.array)
        except BaseException:
            self._abandon()
            raise
        self._sent = None

    def _all_reduce(self) -> None:
        group = self._config.replica_group
        assert group is not None, "there are shards, or replicas, or both"
        array = self._shard.array
        if not self._at_once:
            self._work = group.all_reduce(array, "mean", out=array, async_op=True)
            return
        try:
            group.all_reduce(array, "mean", out=array)
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Keep the memory out of the pool, because other ranks may still reach it."""
        self._shard.abandon()
        if self._sent is not None:
            self._sent.abandon()

    def __del__(self) -> None:
        if self._work is not None:
            self._abandon()


def _in_reduce_dtype(unsharded: PooledBuffer, flat: FlatParameter, config: FSDPConfig) -> PooledBuffer:
    if unsharded.array.dtype == flat.reduce_dtype:
        return unsharded
    source = unsharded.array
    converted = config.pool.allocate(flat.namespace, source.size, flat.reduce_dtype)
    with quiet_overflow(flat.reduce_dtype):
        converted.array[...] = source
    return converted
