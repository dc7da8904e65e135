"""The algorithms of core, which it offers through the same hook as plugins offer theirs."""

from __future__ import annotations

from ferro.collectives import direct, ring, tree
from ferro.collectives.schedule import Build, CollectiveInfo


def _info(collective: str, name: str, build: Build, summary: str, *, combines_once: bool = False) -> CollectiveInfo:
    return CollectiveInfo(
        collective=collective, algorithm=name, build=build, combines_once=combines_once, summary=summary
    )


BUILTIN: tuple[CollectiveInfo, ...] = (
    _info("all_reduce", "exchange", direct.exchange_all_reduce, "one round", combines_once=True),
    _info("all_reduce", "star", direct.star_all_reduce, "to a root and back", combines_once=True),
    _info("all_reduce", "direct", direct.direct_all_reduce, "two rounds", combines_once=True),
    _info("all_reduce", "tree", tree.tree_all_reduce, "reduce to rank 0, then broadcast"),
    _info("all_reduce", "ring", ring.ring_all_reduce, "2(n-1) rounds between neighbours"),
    _info("broadcast", "direct", direct.direct_broadcast, "the root sends to all"),
    _info("broadcast", "tree", tree.tree_broadcast, "binomial tree"),
    _info("broadcast", "scatter_ring", tree.scatter_ring_broadcast, "scatter, then a ring"),
    _info("reduce", "direct", direct.direct_reduce, "all send to the root", combines_once=True),
    _info("reduce", "tree", tree.tree_reduce, "binomial tree"),
    _info("all_gather", "direct", direct.direct_all_gather, "one round"),
    _info("all_gather", "ring", ring.ring_all_gather, "n-1 rounds between neighbours"),
    _info("gather", "direct", direct.direct_gather, "all send to the root"),
    _info("gather", "tree", tree.tree_gather, "binomial tree"),
    _info("scatter", "direct", direct.direct_scatter, "the root sends to all"),
    _info("scatter", "tree", tree.tree_scatter, "binomial tree"),
    _info("reduce_scatter", "direct", direct.direct_reduce_scatter, "one round", combines_once=True),
    _info("reduce_scatter", "ring", ring.ring_reduce_scatter, "n-1 rounds between neighbours"),
    _info("all_to_all", "direct", direct.direct_all_to_all, "one round"),
    _info("all_to_all", "pairwise", direct.pairwise_all_to_all, "n-1 rounds"),
    _info("barrier", "dissemination", tree.dissemination_barrier, "log2(n) rounds"),
)
