"""Who this process is and what the user set: the only reader of `os.environ` in ferro."""

from ferro.runtime.environment.address import Address, format_address, parse_address
from ferro.runtime.environment.child import child_environment, usable_cores
from ferro.runtime.environment.info import LaunchInfo
from ferro.runtime.environment.resolver import resolve
from ferro.runtime.environment.settings import NodeDefaults, Options, node_defaults, options, read_secret, variable

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
