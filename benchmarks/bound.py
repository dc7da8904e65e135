"""The bound: how fast a collective could be if memory were all that takes time.

Let S be the size of the whole buffer and n the number of ranks, all in one memory. What the ranks
give must be read once, and what they get written once:

    all_reduce, all_to_all        n S read, n S written
    all_gather                      S read, n S written      (the inputs together are S)
    reduce_scatter                n S read,   S written      (the results together are S)
    broadcast                       S read, (n - 1) S written

over the bandwidth, read and written, of n processes that copy arrays of their own at the same
time, measured before and after the cases of the same run. Staging, which private arrays need,
costs more; what stays in caches costs less, so a share of the bound may pass 100 % there.
"""

from __future__ import annotations

_PASSES = {
    "all_reduce": lambda n: 2 * n,
    "all_to_all": lambda n: 2 * n,
    "all_gather": lambda n: 1 + n,
    "reduce_scatter": lambda n: n + 1,
    "broadcast": lambda n: n,
}


def bound_s(collective: str, nbytes: int, ranks: int, bandwidth_b_s: float) -> float:
    """Return the seconds that memory alone needs.

    Args:
        collective: its name.
        nbytes: S, the size of the whole buffer.
        ranks: n.
        bandwidth_b_s: bytes read and written in a second.
    """
    return _PASSES[collective](ranks) * nbytes / bandwidth_b_s
