"""The network model of simulated ranks and of the cost of algorithms: latency, bandwidth and hosts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ferro.errors import UsageError


@dataclass(frozen=True, slots=True)
class Network:
    """The cost model's description of a network.

    Attributes:
        latency_s: seconds from the departure of the first byte to its arrival.
        bandwidth_bytes_per_s: bandwidth of each rank's link, in each direction.
        overhead_s: seconds of work for each message, on both of its ends.
        reduce_bytes_per_s: the rate at which a rank combines contributions.
        hosts: for each rank the number of its host; None when all ranks are on one host.
        inter_host_latency_s: latency between ranks of different hosts; None when it is `latency_s`.
        inter_host_bandwidth_bytes_per_s: bandwidth between them; None when it is `bandwidth_bytes_per_s`.

    Raises:
        UsageError: a time is negative, or a rate not above zero.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    overhead_s: float = 0.0
    reduce_bytes_per_s: float = math.inf
    hosts: tuple[int, ...] | None = None
    inter_host_latency_s: float | None = None
    inter_host_bandwidth_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        between = self._between_hosts()
        times = (self.latency_s, self.overhead_s, between[0])
        rates = (self.bandwidth_bytes_per_s, self.reduce_bytes_per_s, between[1])
        if not (all(time >= 0 for time in times) and all(rate > 0 for rate in rates)):
            raise UsageError(f"{self}: give times of 0 or more and rates above 0.")

    def link(self, source: int, target: int) -> tuple[float, float]:
        """Look up the latency in seconds and the bandwidth in bytes per second from one rank to another."""
        if self.hosts is not None and self.hosts[source] != self.hosts[target]:
            return self._between_hosts()
        return self.latency_s, self.bandwidth_bytes_per_s

    def _between_hosts(self) -> tuple[float, float]:
        latency_s, bandwidth = self.inter_host_latency_s, self.inter_host_bandwidth_bytes_per_s
        return (
            self.latency_s if latency_s is None else latency_s,
            self.bandwidth_bytes_per_s if bandwidth is None else bandwidth,
        )
