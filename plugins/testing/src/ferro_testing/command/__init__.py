"""`ferro conformance`: try an installed backend; show the operations that work, are refused or are wrong."""

from ferro_testing.command.command import run
from ferro_testing.command.options import ConformanceOptions, parse_options

__all__ = ["ConformanceOptions", "parse_options", "run"]
