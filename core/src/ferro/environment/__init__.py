"""Who this process is and what the user set: the only reader of `os.environ` in ferro."""

from ferro.environment.address import Address, format_address, parse_address
from ferro.environment.child import child_environment, usable_cores
from ferro.environment.info import LaunchInfo
from ferro.environment.resolver import resolve
from ferro.environment.settings import (
    NodeDefaults,
    Options,
    node_defaults,
    options,
    read_secret,
    variable,
)

__all__ = [
    "Address",
    "LaunchInfo",
    "NodeDefaults",
    "Options",
    "child_environment",
    "format_address",
    "node_defaults",
    "options",
    "parse_address",
    "read_secret",
    "resolve",
    "usable_cores",
    "variable",
]
