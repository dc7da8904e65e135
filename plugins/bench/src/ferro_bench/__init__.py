"""`ferro bench`: collectives measured by size, beside other libraries in one run."""

from ferro_bench.command import run
from ferro_bench.contestants import Contestant, WorldPlan
from ferro_bench.driver import open_worlds
from ferro_bench.measure import default_rounds, make_case, measure
from ferro_bench.options import BenchOptions, parse_options, parse_peers
from ferro_bench.peers import PEERS, find
from ferro_bench.plot import plot
from ferro_bench.rank.case import BenchCase
from ferro_bench.sizes import parse_size, parse_sizes, size_text, time_text
from ferro_bench.summary import BenchRecord, Result, summarize
from ferro_bench.table import spread
from ferro_bench.world import BenchWorld

__all__ = [
    "PEERS",
    "BenchCase",
    "BenchOptions",
    "BenchRecord",
    "BenchWorld",
    "Contestant",
    "Result",
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
    "spread",
    "summarize",
    "time_text",
]
