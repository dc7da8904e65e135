"""Plan: what FSDP's parts have to know, decided once from its arguments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array
from ..replicas import broadcast_arrays
from .memory import Pool
from .precision import MixedPrecision
from .sharding import ShardingStrategy

# Small buffers are broadcast together, in memory of so many bytes.
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where pieces lie, and what stays whole.

    Attributes:
        sharding: the strategy.
        shards: the ranks over which parameters are cut; None when they are not.
        replicas: the ranks that have the same pieces; None when there are no others.
        pool: memory for whole units.
        precision: types of values.
        prefetch: whether units are gathered ahead of their turn.
        offload: whether pieces are kept in host memory.
    """

    sharding: ShardingStrategy
    shards: ProcessGroup | None
    replicas: ProcessGroup | None
    pool: Pool
    precision: MixedPrecision
    prefetch: bool
    offload: bool

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The groups whose product is all ranks."""
        return tuple(group for group in (self.shards, self.replicas) if group is not None)

    @property
    def ranks(self) -> int:
        """How many shards there are."""
        return 1 if self.shards is None else self.shards.world_size

    @property
    def rank(self) -> int:
        """Which of the shards is this rank's."""
        return 0 if self.shards is None else self.shards.rank

    @property
    def is_first(self) -> bool:
        """Whether this rank's values are everyone's at the beginning."""
        return all(group.rank == 0 for group in self.groups)

    @property
    def keeps_whole(self) -> bool:
        """Whether whole parameters and gradients stay, in memory of their own."""
        return self.sharding in (ShardingStrategy.SHARD_OPTIMIZER, ShardingStrategy.NO_SHARD)

    @property
    def gathers_once(self) -> bool:
        """Whether what the forward half gathered serves the backward half."""
        return self.keeps_whole or self.sharding is ShardingStrategy.SHARD_GRAD_OP

    def broadcast(self, arrays: Iterable[Array], roots: Iterable[int]) -> None:
        """Give all ranks the values of one, whose rank in each of the groups `roots` tells."""
        held = list(arrays)
        for group, root in zip(self.groups, roots, strict=True):
            broadcast_arrays(group, held, root, _CHUNK_BYTES)

    def agree(self, faults: list[str], what: str) -> None:
        """See that no rank has found faults; all ranks call it.

        Raises:
            UsageError: one has; raised on every rank, with the faults of the first that has.
        """
        found = "; ".join(faults)
        for group in self.groups:
            everyones: list[str] = group.all_gather_object(found)
            found = next((text for text in everyones if text), "")
        if found:
            raise UsageError(f"{what}: {found}. Nothing was loaded.")


def make_plan(
    group: ProcessGroup,
    *,
    sharding: ShardingStrategy,
    replicas: ProcessGroup | None,
    precision: MixedPrecision | None,
    prefetch: bool,
    offload: bool,
) -> Plan:
    """Check arguments of FSDP and return what follows from them.

    Raises:
        UsageError: unknown strategy, replicas with another than HYBRID_SHARD, or no mesh.
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
    whole = sharding is ShardingStrategy.NO_SHARD
    return Plan(
        sharding=sharding,
        shards=None if whole else group,
        replicas=group if whole else replicas,
        pool=Pool(group),
        precision=precision or MixedPrecision(),
        prefetch=prefetch,
        offload=offload,
    )
