"""ShardingStrategy: what FSDP cuts into pieces, and when the whole is there."""

from __future__ import annotations

from enum import StrEnum


class ShardingStrategy(StrEnum):
    """What is cut into one piece per rank. "Whole" is one unit at a time, in passes only.

    | strategy        | parameters             | gradients       | optimizer state | per step sent |
    |-----------------|------------------------|-----------------|-----------------|---------------|
    | FULL_SHARD      | whole in each half     | whole in a half | pieces          | 2 g + r       |
    | SHARD_GRAD_OP   | whole until backward   | whole in a half | pieces          | g + r         |
    | SHARD_OPTIMIZER | whole always           | whole always    | pieces          | g + r         |
    | NO_SHARD        | whole always           | whole always    | whole           | a             |
    | HYBRID_SHARD    | whole in each half     | whole in a half | pieces          | 2 g + r + a/n |

    g: all_gather, r: reduce_scatter, a: all_reduce of the whole model. The first three are also
    known as ZeRO-3, ZeRO-2 and ZeRO-1. HYBRID_SHARD is FULL_SHARD over `group`, with a copy of
    everything on each rank of `replicas`; its gradients are reduced over `group`, then the pieces
    over `replicas`.

    Memory. Beside pieces, FULL_SHARD needs that of three units at most, the largest ones, and
    keeps it for the next pass. In the forward half two are in use: the unit that computes and the
    next one. The last two stay between the halves, for the backward half begins with them; so they
    are gathered once. In the backward half the third is for the gradient of the unit that
    computes: the next unit is gathered where the gradient of the one before is, for it comes after
    its reduction. (So with NumPy; CuPy's arrays, which are in no queue, and a unit larger than the
    one before take a fourth.) `prefetch=False` saves one. While other pullbacks are in flight, two
    more stay. What is reduced on top of an earlier gradient takes a piece more.
    SHARD_GRAD_OP holds all units between the halves.

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models", 2020; Zhao et al., "PyTorch FSDP", 2023.
    """

    FULL_SHARD = "full_shard"
    SHARD_GRAD_OP = "shard_grad_op"
    SHARD_OPTIMIZER = "shard_optimizer"
    NO_SHARD = "no_shard"
    HYBRID_SHARD = "hybrid_shard"
