"""Measure the share of the link's rate that all_reduce between two hosts reaches.

    sudo python benchmarks/hosts.py                              64 MiB over 1 Gbit/s
    sudo python benchmarks/hosts.py --mbit 2500 --mtu 9000 --mib 256

The hosts are network namespaces, joined by a link whose rate `tc` limits. Every round measures, one
after the other: a plain socket in both directions at once, which reaches the rate less the headers
(95 % at MTU 1500, 99 % at 9000); all_reduce with shared memory on each host; and all_reduce without
shared memory. A share is the bytes that must leave a host (2(H-1)/H times the array) over time and
rate.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from namespaces import CannotMakeHosts, Hosts  # the tests use the same hosts
from records import machine_facts

if TYPE_CHECKING:
    from collections.abc import Sequence

_HERE = Path(__file__).resolve().parent
_ROLES = _HERE / "host_roles.py"
_PORT = 29500  # free, for the namespaces are new
_TIMEOUT_S = 120.0
_ALGORITHMS = ("hierarchical", "flat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=1000.0, help="rate of the link, Mbit/s")
    parser.add_argument("--delay-ms", type=float, default=0.2, help="one way")
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--mib", type=int, default=64, help="size of the array")
    parser.add_argument("--ranks", type=int, default=2, help="on each host")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=4, help="of all_reduce in a round")
    parser.add_argument("--out", type=Path, default=_HERE / "results" / "hosts.json")
    options = parser.parse_args()
    record = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine_facts()} | record, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Measure all rounds, and return the seconds and shares for JSON."""
    nbytes = options.mib << 20
    seconds: dict[str, list[float]] = {"plain sockets": []} | {name: [] for name in _ALGORITHMS}
    with Hosts.made(mtu=options.mtu) as hosts:
        delay_ms = options.delay_ms
        try:
            hosts.shape(options.mbit, delay_ms)
        except CannotMakeHosts as error:
            print(f"without delay: {error}")
            delay_ms = 0.0
            hosts.shape(options.mbit)
        for _ in range(options.rounds):
            seconds["plain sockets"] += _stream(hosts, nbytes)
            for name in _ALGORITHMS:
                seconds[name] += _all_reduce(hosts, name, options)
    shares = {name: nbytes * 8 / statistics.median(times) / (options.mbit * 1e6) for name, times in seconds.items()}
    for name, share in shares.items():
        print(f"{name:<14} {statistics.median(seconds[name]):7.3f} s   {share:6.1%} of the rate")
    goodput = shares["hierarchical"] / shares["plain sockets"]
    print(f"hierarchical, relative to plain sockets: {goodput:.1%}")
    return {
        "mbit": options.mbit,
        "delay_ms": delay_ms,
        "mtu": options.mtu,
        "nbytes": nbytes,
        "hosts": 2,
        "ranks_per_host": options.ranks,
        "seconds": seconds,
        "share_of_rate": shares,
        "share_of_plain_sockets": goodput,
    }


def _stream(hosts: Hosts, nbytes: int) -> list[float]:
    """Return the seconds of `nbytes` over a plain socket, in both directions at once."""
    program = [sys.executable, _ROLES, "stream", hosts.addresses[0], _PORT, nbytes]
    output = hosts.run([[*program, "listen"], [*program, "connect"]], [{}, {}], _TIMEOUT_S)
    return [max(map(float, output.split()))]


def _all_reduce(hosts: Hosts, algorithm: str, options: argparse.Namespace) -> list[float]:
    """Return the seconds of the slowest rank for each call."""
    run: Sequence[object] = [
        *(sys.executable, "-m", "ferro", "run", "--nnodes", 2, "-n", options.ranks),
        *("--rdzv-endpoint", f"{hosts.addresses[0]}:{_PORT}"),
    ]
    role = [_ROLES, "all_reduce", algorithm, options.mib << 20, options.calls]
    secret = secrets.token_hex(32)
    output = hosts.run(
        [[*run, "--node-rank", node, *role] for node in range(2)],
        [{"FERRO_SECRET": secret, "FERRO_HOST_ID": name} for name in hosts.names],
        _TIMEOUT_S,
    )
    marked = [line.partition("seconds: ")[2] for line in output.splitlines() if "seconds: " in line]
    assert len(marked) == 1, output
    return json.loads(marked[0])


if __name__ == "__main__":
    main()
