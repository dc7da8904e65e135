"""This process's place in its job, and the user's settings: the only reader of `os.environ` in ferro."""

from ferro.runtime.environment.cores import thread_advice, usable_cores, usable_cores_together
from ferro.runtime.environment.launch_info import Address, LaunchInfo, format_address, parse_address, read_secret
from ferro.runtime.environment.resolver import resolve
from ferro.runtime.environment.settings import child_environment, node_defaults, options, replace_environment, variable

__all__ = [
    "Address", "LaunchInfo", "child_environment", "format_address", "node_defaults", "options", "parse_address",
    "read_secret", "replace_environment", "resolve", "thread_advice", "usable_cores",
    "usable_cores_together", "variable",
]  # fmt: skip
