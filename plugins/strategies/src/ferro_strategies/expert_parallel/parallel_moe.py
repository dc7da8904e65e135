"""ParallelMoE: a MoE whose experts are divided over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

from ferro import ProcessGroup, UsageError
from ferro.collectives.partition import even_sizes

from ..nn.arrays import Array, namespace_of
from ..nn.module import Module
from ..nn.parameter import Split
from ..tensor_parallel.conversion import check_shard_sizes
from ..tensor_parallel.sharding import local_shard, shard_slice
from .moe import MoE, _Segments


class ParallelMoE(MoE):
    """`MoE` for this rank's tokens, which travel to the ranks that have their experts, and back.

    A forward pass takes an all_gather of counts and two all_to_alls of tokens, a pullback two more. Ranks may have any
    number of tokens. Output and input's gradient are those of `MoE` on the tokens of all ranks together; capacity and
    auxiliary loss are those of all tokens, too.

    Gradients are those of the mean of the ranks' losses: the experts' are complete when the pullback returns, and the
    router's is this rank's term, which `ExpertParallel` averages over the ranks as those of all other layers.

    Args:
        layer: the MoE, whose parameters this layer takes over: each holds this rank's experts afterwards.
        group: the ranks; experts are divided as by numpy.array_split.
    """

    def __init__(self, layer: MoE, group: ProcessGroup) -> None:
        if type(layer) is not MoE:
            raise UsageError(f"ParallelMoE is made of MoE, not of {layer!r}.")
        vars(self).update(vars(layer))
        self._group = group
        self._sizes = even_sizes(self.num_experts, group.world_size)
        check_shard_sizes(ParallelMoE, "num_experts", self.num_experts, self._sizes, group)
        self._rank = group.rank
        self._mean_ranks = group.world_size
        start = shard_slice(self._sizes, group.rank).start
        for parameter in (self.up, self.up_bias, self.down, self.down_bias):
            shape = parameter.shape
            parameter.hold(self._own_experts(parameter.data), grad=None, grad_memory=None)
            parameter.splits = (Split(group=group, dim=0, shape=shape, start=start),)
            for owner in parameter.state_owners:
                owner.reshape_state(parameter, self._own_experts)

    @classmethod
    def from_serial(cls, layer: Module, group: ProcessGroup) -> ParallelMoE:
        """Make the layer; see the class.

        Raises:
            UsageError: `layer` is no MoE, or has fewer experts than there are ranks.
        """
        if not isinstance(layer, MoE):
            raise UsageError(f"ParallelMoE is made of MoE, not of {layer!r}.")
        return cls(layer, group)

    def _own_experts(self, whole: Array) -> Array:
        """Copy this rank's part of an array of all experts."""
        own: Array = local_shard(whole, self._group, 0, self._sizes).copy()
        return own

    def _gather_counts(self, counts: Array) -> Array:
        whole: Array = self._group.all_gather(counts[None])
        return whole

    def _sum(self, values: Array) -> Array:
        total: Array = self._group.all_reduce(values)
        return total

    def _to_experts(self, rows: Array, counts: Array) -> tuple[_Segments, Callable[[Array], Array]]:
        xp = namespace_of(rows)
        ends = [0, *accumulate(self._sizes)]
        sends = [int(counts[self._rank, start:stop].sum()) for start, stop in pairwise(ends)]
        own = counts[:, ends[self._rank] : ends[self._rank + 1]]
        receives = own.sum(axis=1).tolist()
        received = self._group.all_to_all(rows, send_sizes=sends, recv_sizes=receives)
        # The rows come sorted by rank, then by expert, and are needed sorted by expert.
        experts = xp.repeat(xp.tile(xp.arange(own.shape[1]), own.shape[0]), own.reshape(own.size).tolist())
        order = xp.argsort(experts, kind="stable")

        def back(made: Array) -> Array:
            by_rank = xp.empty_like(made)
            by_rank[order] = made
            returned: Array = self._group.all_to_all(by_rank, send_sizes=receives, recv_sizes=sends)
            return returned

        return (received[order], own.sum(axis=0).tolist()), back
