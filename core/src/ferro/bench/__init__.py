"""`ferro bench`: collectives measured by size, beside other libraries in one run."""

from ferro.bench.command import run
from ferro.bench.contestants import Contestant, WorldPlan
from ferro.bench.driver import open_worlds
from ferro.bench.measure import default_rounds, make_case, measure
from ferro.bench.options import BenchOptions, parse_options, parse_peers
from ferro.bench.peers import PEERS, find
from ferro.bench.plot import plot
from ferro.bench.sizes import parse_size, parse_sizes, size_text, time_text
from ferro.bench.summary import Record, Result, summarize
from ferro.bench.world import World

__all__ = [
    "PEERS",
    "BenchOptions",
    "Contestant",
    "Record",
    "Result",
    "World",
    "WorldPlan",
    "default_rounds",
    "find",
    "make_case",
    "measure",
    "open_worlds",
    "parse_options",
    "parse_peers",
    "parse_size",
    "parse_sizes",
    "plot",
    "run",
    "size_text",
    "summarize",
    "time_text",
]
