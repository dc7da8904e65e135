"""`ferro conformance`: what an installed backend does, refuses and gets wrong, by trying it."""

from ferro.conformance.command import run
from ferro.conformance.options import ConformanceOptions, parse_options

__all__ = ["ConformanceOptions", "parse_options", "run"]
