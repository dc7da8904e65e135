"""Hosts that are network namespaces, joined by one cable: for tests, and for `benchmarks/hosts.py`.

Needs root and iproute2, and Linux with veth. The cable is a pair of virtual interfaces; `shape`
gives it a rate in both directions, and a delay where the kernel can (sch_netem).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

_SETUP_S = 10.0
# What may leave at once after a pause, and wait for its turn: both much less than what is measured.
_BURST_BYTES = 256 << 10
_QUEUE_MS = 50
_number = count()


class CannotMakeHosts(Exception):
    """This machine makes no network namespaces, for this reason."""


@dataclass(frozen=True)
class Hosts:
    """Two hosts.

    Attributes:
        names: of their namespaces.
        ends: the cable's interface in each.
        addresses: of each, reachable from the other.
    """

    names: tuple[str, str]
    ends: tuple[str, str]
    addresses: tuple[str, str] = ("10.77.0.1", "10.77.0.2")

    @classmethod
    @contextlib.contextmanager
    def made(cls, *, mtu: int = 1500) -> Iterator[Hosts]:
        """Make two hosts; take them away at the end, whatever happens.

        Raises:
            CannotMakeHosts: this machine makes none.
        """
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise CannotMakeHosts("making network namespaces needs root and iproute2")
        mark = f"{os.getpid() % 100_000}x{next(_number)}"
        hosts = cls((f"fa{mark}", f"fb{mark}"), (f"va{mark}", f"vb{mark}"))
        try:
            try:
                hosts._set_up(mtu)
            except subprocess.CalledProcessError as error:
                raise CannotMakeHosts(f"no network namespaces here: {error.stderr!r}") from error
            yield hosts
        finally:
            for name in hosts.names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=_SETUP_S)

    def _set_up(self, mtu: int) -> None:
        for name in self.names:
            _run("ip", "netns", "add", name)
        first, second = self.ends
        _run(
            *("ip", "-n", self.names[0], "link", "add", first, "mtu", str(mtu), "type", "veth"),
            *("peer", "name", second, "mtu", str(mtu), "netns", self.names[1]),
        )
        for name, end, address in zip(self.names, self.ends, self.addresses, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", end)
            _run("ip", "-n", name, "link", "set", end, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")

    def shape(self, mbit: float, delay_ms: float = 0.0) -> None:
        """Give the cable a rate in each direction, and a delay one way.

        Raises:
            CannotMakeHosts: this kernel cannot.
        """
        if shutil.which("tc") is None:
            raise CannotMakeHosts("shaping a link needs tc, of iproute2")
        how = ["tbf", "rate", f"{mbit}mbit", "burst", str(_BURST_BYTES), "latency"]
        how += [f"{_QUEUE_MS}ms"]
        if delay_ms:
            how = ["netem", "rate", f"{mbit}mbit", "delay", f"{delay_ms}ms", "limit", "10000"]
        for name, end in zip(self.names, self.ends, strict=True):
            try:
                _run("tc", "-n", name, "qdisc", "replace", "dev", end, "root", *how)
            except subprocess.CalledProcessError as error:
                raise CannotMakeHosts(f"this kernel has no {how[0]}: {error.stderr!r}") from error

    def start(self, host: int, command: Sequence[object], variables: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a command on a host, its output and errors in one pipe."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *map(str, command)],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, commands: Sequence[Sequence[object]], variables: Sequence[Mapping[str, str]], limit_s: float = 60.0
    ) -> str:
        """Run one command on each host; return what they printed together.

        Raises:
            AssertionError: one of them failed.
        """
        started = [
            self.start(host, command, extra)
            for host, (command, extra) in enumerate(zip(commands, variables, strict=True))
        ]
        try:
            outputs = [process.communicate(timeout=limit_s)[0] for process in started]
        finally:
            for process in started:
                process.kill()
                process.communicate()
        assert [process.returncode for process in started] == [0, 0], outputs
        return "".join(outputs)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=_SETUP_S)
