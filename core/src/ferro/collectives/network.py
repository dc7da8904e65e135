"""The model of a network: latency, bandwidth and hosts, by which simulated ranks and the cost of algorithms go."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ferro.errors import UsageError


@dataclass(frozen=True, slots=True)
class Network:
    """The cost model's description of a network.

    Attributes:
        latency_s: seconds from the departure of the first byte to its arrival.
        bandwidth_bytes_per_s: of each rank's link, each way.
        overhead_s: seconds of work for each message, on both of its ends.
        reduce_bytes_per_s: the rate at which a rank combines contributions.
        hosts: for each rank the number of its host; None: all are on one.
        inter_host_latency_s: `latency_s` between ranks of different hosts; None: the same.
        inter_host_bandwidth_bytes_per_s: the bandwidth between them; None: the same.

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
        """Give the latency in seconds and the bandwidth in bytes per second from one rank to another."""
        if self.hosts is not None and self.hosts[source] != self.hosts[target]:
            return self._between_hosts()
        return self.latency_s, self.bandwidth_bytes_per_s

    def _between_hosts(self) -> tuple[float, float]:
        latency_s, bandwidth = self.inter_host_latency_s, self.inter_host_bandwidth_bytes_per_s
        return (
            self.latency_s if latency_s is None else latency_s,
            self.bandwidth_bytes_per_s if bandwidth is None else bandwidth,
        )
