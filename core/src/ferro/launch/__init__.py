"""`ferro run`: start a program as several ranks, and wait for all of them."""

from ferro.launch.job import main, run
from ferro.launch.options import LaunchOptions, parse_options

__all__ = ["LaunchOptions", "main", "parse_options", "run"]
