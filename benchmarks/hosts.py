"""Measure all_reduce between two hosts: which share of their link's rate it reaches.

    sudo python benchmarks/hosts.py                              64 MiB over 1 Gbit/s
    sudo python benchmarks/hosts.py --mbit 2500 --mtu 9000 --mib 256

The hosts are network namespaces, joined by a cable that `tc` gives a rate. Every round measures,
one after the other: a plain socket each way at once, which is what the link can carry beside its
own headers (at MTU 1500 that is 95 % of the rate, at 9000 it is 99 %); all_reduce with shared
memory in each host; the same with every rank by itself. A share is the bytes that must leave a
host (2(H-1)/H times the array) over time and rate.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from namespaces import CannotMakeHosts, Hosts  # the tests' hosts are these

if TYPE_CHECKING:
    from collections.abc import Sequence

_HERE = Path(__file__).resolve().parent
_ROLES = _HERE / "host_roles.py"
_PORT = 29500  # nobody else is in the namespaces
_LIMIT_S = 120.0
_WAYS = ("hierarchical", "flat")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    options.out.write_text(json.dumps({"machine": machine.facts()} | record, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Return the seconds of everything, and what they mean."""
    nbytes = options.mib << 20
    seconds: dict[str, list[float]] = {"plain sockets": []} | {way: [] for way in _WAYS}
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
            for way in _WAYS:
                seconds[way] += _all_reduce(hosts, way, options)
    shares = {
        what: nbytes * 8 / statistics.median(times) / (options.mbit * 1e6)
        for what, times in seconds.items()
    }
    for what, share in shares.items():
        print(f"{what:<14} {statistics.median(seconds[what]):7.3f} s   {share:6.1%} of the rate")
    goodput = shares["hierarchical"] / shares["plain sockets"]
    print(f"hierarchical, of what plain sockets carry: {goodput:.1%}")
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
    """Return how long so many bytes take over a plain socket, each way at once."""
    program = [sys.executable, _ROLES, "stream", hosts.addresses[0], _PORT, nbytes]
    output = hosts.run([[*program, "listen"], [*program, "dial"]], [{}, {}], _LIMIT_S)
    return [max(map(float, output.split()))]


def _all_reduce(hosts: Hosts, way: str, options: argparse.Namespace) -> list[float]:
    """Return how long the slowest rank took for each call."""
    run: Sequence[object] = [
        *(sys.executable, "-m", "ferro", "run", "--nnodes", 2, "-n", options.ranks),
        *("--rdzv-endpoint", f"{hosts.addresses[0]}:{_PORT}"),
    ]
    role = [_ROLES, "all_reduce", way, options.mib << 20, options.calls]
    secret = secrets.token_hex(32)
    output = hosts.run(
        [[*run, "--node-rank", node, *role] for node in range(2)],
        [{"FERRO_SECRET": secret, "FERRO_HOST_ID": name} for name in hosts.names],
        _LIMIT_S,
    )
    marked = [line.partition("seconds: ")[2] for line in output.splitlines() if "seconds: " in line]
    assert len(marked) == 1, output
    return json.loads(marked[0])


if __name__ == "__main__":
    main()
