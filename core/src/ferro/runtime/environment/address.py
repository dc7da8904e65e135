"""Addresses as users write them: "host:port", "[::1]:29500", or two variables."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ferro.errors import UsageError
from ferro.runtime.environment.number import integer

Address = tuple[str, int]
"""A host (name or IP address, IPv6 without brackets) and a port."""


def parse_address(text: str, *, source: str) -> Address:
    """Read "host:port"; an IPv6 address stands in brackets: "[::1]:29500".

    Args:
        text: what was given.
        source: the variable or argument that it came from, for the message.

    Raises:
        UsageError: it is no address with a port from 1 to 65535.
    """
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:\s]+)):([0-9]{1,5})", text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise UsageError(
            f"{source}={text!r} is not an address; write host:port with a port from 1 to 65535, "
            "and an IPv6 address in brackets, as in [::1]:29500"
        )
    return match[1] or match[2], int(match[3])


def format_address(address: Address) -> str:
    """The text that `parse_address` reads back."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_pair(env: Mapping[str, str], host: str, port: str) -> Address:
    """An address from one variable with the host and one with the port."""
    for name, other in ((host, port), (port, host)):
        if not env.get(name):
            raise UsageError(
                f"{other}={env.get(other, '')!r} is set, but {name} is not; "
                "set both to where rank 0 can be reached, or unset both"
            )
    number = integer(env, port)
    if not 0 < number.value < 65536:
        raise UsageError(f"{port}={number.value} is not a port; set one from 1 to 65535")
    return env[host].strip("[]"), number.value
