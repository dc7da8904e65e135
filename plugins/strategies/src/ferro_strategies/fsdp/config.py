"""FSDPConfig: the sharding strategy, the dtypes and the process groups of one FSDP module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array
from ..nn.trees import Arrays
from ..replicas import broadcast_arrays
from .buffer_pool import BufferPool

# Small module buffers are broadcast together, in memory of this size.
_BROADCAST_BYTES = 1 << 20


class ShardingStrategy(StrEnum):
    """The extent of sharding. "While it computes": only one unit at a time is unsharded.

    | strategy        | parameters               | gradients           | optimizer | sent per step |
    |-----------------|--------------------------|---------------------|-----------|---------------|
    | FULL_SHARD      | while it computes        | while it computes   | sharded   | 2 g + r       |
    | SHARD_GRAD_OP   | unsharded until backward | while it computes   | sharded   | g + r         |
    | SHARD_OPTIMIZER | unsharded always         | unsharded always    | sharded   | g + r         |
    | NO_SHARD        | unsharded always         | unsharded always    | unsharded | a             |
    | HYBRID_SHARD    | while it computes        | while it computes   | sharded   | 2 g + r + a/n |

    g: all_gather, r: reduce_scatter, a: all_reduce of the whole model. The first three are also
    known as ZeRO-3, ZeRO-2 and ZeRO-1. HYBRID_SHARD is FULL_SHARD over `group`, with a copy of
    everything on each rank of `replicas`; its gradients are reduced over `group`, and then the
    shards of the gradients over `replicas`.

    Memory. Besides shards, FULL_SHARD needs the memory of three units at most, the largest ones, and keeps it for the
    next pass. In the forward pass two are in use: the unit that computes and the next one. The last two units stay
    gathered until the backward pass, which begins with them. In the backward pass the third is for the gradient of the
    unit that computes: the next unit is gathered into the memory of the previous unit's gradient, because the gather is
    queued after that gradient's reduction. (A fourth is needed for CuPy arrays, whose reuse no queue orders, and for a
    unit that is larger than the one before.) `prefetch=False` saves one. Other pullbacks in flight keep two more.
    Adding to an earlier reduced gradient takes the memory of one more shard. SHARD_GRAD_OP holds all units between the
    forward and the backward pass.

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models", 2020; Zhao et al., "PyTorch FSDP", 2023.
    """

    FULL_SHARD = "full_shard"
    SHARD_GRAD_OP = "shard_grad_op"
    SHARD_OPTIMIZER = "shard_optimizer"
    NO_SHARD = "no_shard"
    HYBRID_SHARD = "hybrid_shard"


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecision:
    """Dtypes of floating-point values; None leaves them as they are.

    The shards that ranks own, and that the optimizer changes, keep the dtype that the parameters
    had: float32, usually. Complex parameters are never converted.

    Attributes:
        param_dtype: of gathered parameters, and so of the computation and of its gradients.
        reduce_dtype: of gradients while they are reduced; None: that of the computation.
        output_dtype: of the model's output.
        cast_inputs: whether the model's floating input is converted to `param_dtype`.
    """

    param_dtype: npt.DTypeLike | None = None
    reduce_dtype: npt.DTypeLike | None = None
    output_dtype: npt.DTypeLike | None = None
    cast_inputs: bool = True

    def compute_dtype_of(self, dtype: np.dtype) -> np.dtype:
        """Return the dtype of the computation for a parameter of this dtype."""
        return _converted_dtype(self.param_dtype, dtype)

    def reduce_dtype_of(self, dtype: np.dtype) -> np.dtype:
        """Return the dtype of the reduction for the gradient of a parameter of this dtype."""
        return _converted_dtype(self.reduce_dtype, self.compute_dtype_of(dtype))

    def cast_input(self, x: Arrays) -> Arrays:
        """Convert one leaf of the model's input if `cast_inputs` says so."""
        return _converted(x, self.param_dtype if self.cast_inputs else None)

    def cast_output(self, y: Arrays) -> Arrays:
        """Convert one leaf of the model's output to `output_dtype`."""
        return _converted(y, self.output_dtype)


def _converted(leaf: Arrays, wanted: npt.DTypeLike | None) -> Arrays:
    """Convert a floating-point array; other leaves, such as indices or None, stay as they are."""
    if wanted is None or not hasattr(leaf, "dtype"):
        return leaf
    return leaf.astype(_converted_dtype(wanted, leaf.dtype), copy=False)


def _converted_dtype(wanted: npt.DTypeLike | None, dtype: np.dtype) -> np.dtype:
    # NumPy does not know that bfloat16, which comes from ml_dtypes, is floating.
    floating = dtype.kind == "f" or dtype.name == "bfloat16"
    return dtype if wanted is None or not floating else np.dtype(wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class FSDPConfig:
    """The settings of one FSDP module, made by `make_config` from FSDP's arguments.

    Attributes:
        sharding: the strategy.
        shard_group: the ranks over which parameters are sharded; None when they are not.
        replica_group: the ranks that have the same shards; None when there are no others.
        pool: memory for unsharded units.
        precision: dtypes of values.
        prefetch: whether units are gathered ahead of their turn.
        offload: whether shards are kept in host memory.
        check_replicas: whether ranks that have the same shards compare them.
    """

    sharding: ShardingStrategy
    shard_group: ProcessGroup | None
    replica_group: ProcessGroup | None
    pool: BufferPool
    precision: MixedPrecision
    prefetch: bool
    offload: bool
    check_replicas: bool

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The groups, one or two, that together connect all ranks: shard group and replica group."""
        return tuple(group for group in (self.shard_group, self.replica_group) if group is not None)

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return 1 if self.shard_group is None else self.shard_group.world_size

    @property
    def shard_rank(self) -> int:
        """The number of this rank's shard."""
        return 0 if self.shard_group is None else self.shard_group.rank

    @property
    def is_first(self) -> bool:
        """True on the rank whose initial values all ranks get."""
        return all(group.rank == 0 for group in self.groups)

    @property
    def keeps_unsharded(self) -> bool:
        """True if unsharded parameters and gradients stay in memory between passes."""
        return self.sharding in (ShardingStrategy.SHARD_OPTIMIZER, ShardingStrategy.NO_SHARD)

    @property
    def keeps_until_backward(self) -> bool:
        """True if parameters gathered in the forward pass stay for the backward pass."""
        return self.keeps_unsharded or self.sharding is ShardingStrategy.SHARD_GRAD_OP

    def broadcast(self, arrays: Iterable[Array], roots: Iterable[int]) -> None:
        """Broadcast arrays from one rank to all; `roots` is its rank in each of `groups`."""
        held = list(arrays)
        for group, root in zip(self.groups, roots, strict=True):
            broadcast_arrays(group, held, root, _BROADCAST_BYTES)

    def raise_on_any_fault(self, faults: list[str], what: str) -> None:
        """Raise on every rank if any rank has found a fault; all ranks call it.

        Raises:
            UsageError: a rank has found a fault; the message has the faults of the first such rank.
        """
        found = "; ".join(faults)
        for group in self.groups:
            all_found: list[str] = group.all_gather_object(found)
            found = next((text for text in all_found if text), "")
        if found:
            raise UsageError(f"{what}: {found}. Nothing was loaded.")


def make_config(
    group: ProcessGroup,
    *,
    sharding: ShardingStrategy,
    replicas: ProcessGroup | None,
    precision: MixedPrecision | None,
    prefetch: bool,
    offload: bool,
    check_replicas: bool = True,
) -> FSDPConfig:
    """Check FSDP's arguments and make the configuration.

    Raises:
        UsageError: the strategy is unknown, `replicas` does not fit it, or the groups are no mesh.
    """
    try:
        sharding = ShardingStrategy(sharding)
    except ValueError:
        names = ", ".join(ShardingStrategy)
        raise UsageError(f"FSDP: unknown sharding {sharding!r}. Take one of {names}.") from None
    hybrid = sharding is ShardingStrategy.HYBRID_SHARD
    if hybrid != (replicas is not None):
        raise UsageError(
            f"FSDP: sharding is {sharding} and replicas is {replicas!r}. Give the group of ranks "
            "with the same pieces as `replicas` for hybrid_shard, and only for that."
        )
    if replicas is not None and len({*group.global_ranks} & {*replicas.global_ranks}) != 1:
        raise UsageError(
            f"FSDP: group {group.name!r} and replicas {replicas.name!r} share more than this rank. "
            "They must be a row and a column of a mesh."
        )
    replicated = sharding is ShardingStrategy.NO_SHARD
    return FSDPConfig(
        sharding=sharding,
        shard_group=None if replicated else group,
        replica_group=group if replicated else replicas,
        pool=BufferPool(group),
        precision=precision or MixedPrecision(),
        prefetch=prefetch,
        offload=offload,
        check_replicas=check_replicas,
    )
