"""`ferro conformance`: what an installed backend does, refuses and gets wrong, by trying it."""

from ferro_testing.command.command import run
from ferro_testing.command.options import ConformanceOptions, parse_options

__all__ = ["ConformanceOptions", "parse_options", "run"]
