"""Topology: where the ranks of a group live, and how many of them a call should use.

    host 0   rank 0 ── rail 0 ── rank 1   host 1
             rank 2 ── rail 1 ── rank 3
                                 rank 4

A rail connects the ranks of one place in their hosts' lists, one of every host; there are as many
as every host has ranks. Rank 4 above is on none: it moves its data through its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Measured with all_reduce on 2 hosts of 2 ranks and one core, medians in us:
#
#                      over 1 Gbit/s                 as fast as the cores carry it
#              32 B   16 KiB   64 KiB   256 KiB      1 MiB    4 MiB   16 MiB
#   leaders     148      160      537     2,174      5,996   19,776   64,031
#   slices      232      245      549     2,613      4,054   14,516   53,296
#   one level   190      209    1,088     4,491      6,239   15,662   62,681
_LEADERS_BYTES = 256 << 10
# all_reduce of 64 MiB over 1 Gbit/s, in blocks of 16, 8 and 4 MiB, reached 91.0, 90.3 and 92.5 % of
# the rate at MTU 1500, and 95.3, 96.3 and 97.0 % at 9000: the first block's time on the hosts and
# the last one's are not hidden by the network. Of 2 MiB nothing could be told from noise.
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Topology:
    """The hosts of a group, as one of its ranks sees them.

    Attributes:
        hosts: the ranks by host, each list ascending, hosts by their lowest rank; two at least.
        rank: whose view it is.
        host: number of the host that this rank is on.
        place: this rank's place on its host, from 0; its rank among its neighbours.
        rails: how many rails there are.
    """

    hosts: tuple[tuple[int, ...], ...]
    rank: int
    host: int
    place: int
    rails: int

    @classmethod
    def of(cls, hosts: Sequence[Sequence[int]], rank: int) -> Topology:
        """Return the topology of these hosts, seen from `rank`."""
        fixed = tuple(tuple(host) for host in hosts)
        number = next(index for index, host in enumerate(fixed) if rank in host)
        rails = min(len(host) for host in fixed)
        return cls(fixed, rank, number, fixed[number].index(rank), rails)

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The ranks on this rank's host, itself included."""
        return self.hosts[self.host]

    @property
    def others(self) -> tuple[int, ...]:
        """The numbers of the other hosts, from the next one round: no host is all's first."""
        n = len(self.hosts)
        return tuple((self.host + step) % n for step in range(1, n))

    def agent(self, place: int) -> int:
        """Return the place that speaks for each host when one does: `place` if that has a rail."""
        return place if place < self.rails else 0

    def home(self, root: int) -> tuple[int, int]:
        """Return the host of a rank, and its place there."""
        number = next(index for index, host in enumerate(self.hosts) if root in host)
        return number, self.hosts[number].index(root)


def by_leaders(nbytes: int) -> bool:
    """Say whether one rank speaks for its host; otherwise every rank on a rail moves a slice.

    Up to a size that costs fewer messages; beyond, one rank's core and socket do not fill a
    quick link. Depends only on what all ranks share.

    Args:
        nbytes: size of the whole call's data on a rank.
    """
    return nbytes <= _LEADERS_BYTES


def number_of_blocks(nbytes: int) -> int:
    """Return in how many blocks to move so much, one on the network, the next on the hosts."""
    return max(1, -(-nbytes // _BLOCK_BYTES))
