"""Topology: the hosts and rails of a group, and whether a call uses all rails or one leader per host.

    host 0   rank 0 ── rail 0 ── rank 1   host 1
             rank 2 ── rail 1 ── rank 3
                                 rank 4

A rail connects the ranks with the same local rank, one of every host. There are as many rails as
the smallest host has ranks. Rank 4 above is on none: the ranks on its host move its data.
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
# the rate at MTU 1500, and 95.3, 96.3 and 97.0 % at 9000: the network does not hide the time of the
# first and the last block on the hosts. Blocks of 2 MiB differed by no more than noise.
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Topology:
    """The hosts of a group, as one of its ranks sees them.

    Attributes:
        hosts: the ranks by host, each list ascending, hosts by their lowest rank; at least two hosts.
        rank: this rank.
        host_index: the index of this rank's host.
        local_rank: this rank's index among the ranks on its host.
        rails: the number of rails.
    """

    hosts: tuple[tuple[int, ...], ...]
    rank: int
    host_index: int
    local_rank: int
    rails: int

    @classmethod
    def of(cls, hosts: Sequence[Sequence[int]], rank: int) -> Topology:
        """Describe these hosts as `rank` sees them."""
        fixed = tuple(tuple(host) for host in hosts)
        host_index = next(index for index, host in enumerate(fixed) if rank in host)
        rails = min(len(host) for host in fixed)
        return cls(fixed, rank, host_index, fixed[host_index].index(rank), rails)

    @property
    def host_ranks(self) -> tuple[int, ...]:
        """The ranks on this rank's host, itself included."""
        return self.hosts[self.host_index]

    @property
    def other_hosts(self) -> tuple[int, ...]:
        """The indices of the other hosts, from the next one on, so that not all hosts send to host 0 first."""
        n = len(self.hosts)
        return tuple((self.host_index + step) % n for step in range(1, n))

    def leader_for(self, local_rank: int) -> int:
        """Choose the local rank of the hosts' leaders: `local_rank` if it has a rail, 0 otherwise."""
        return local_rank if local_rank < self.rails else 0

    def locate(self, rank: int) -> tuple[int, int]:
        """Find the host index and the local rank of a rank."""
        index = next(index for index, host in enumerate(self.hosts) if rank in host)
        return index, self.hosts[index].index(rank)


def uses_leaders(nbytes: int) -> bool:
    """Return True if one leader per host moves all data, False if all rails move slices.

    Leaders need fewer messages, but the core and socket of one rank cannot use all of a fast link. `nbytes`, the size
    of the call's data on a rank, is the same on all ranks, and so is the answer.
    """
    return nbytes <= _LEADERS_BYTES


def block_count(nbytes: int) -> int:
    """Choose the number of pipeline blocks: one is on the network while hosts prepare the next."""
    return max(1, -(-nbytes // _BLOCK_BYTES))
