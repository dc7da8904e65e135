"""The testing kit: ranks as processes with deadlines, conformance checks, parity.

The conformance checks for authors of backends are in `ferro_testing.conformance`, which importing
this package does not import.
"""

from ferro_testing.outcome import Outcome, RanksFailed
from ferro_testing.parity import assert_same_parameters
from ferro_testing.ranks import run_ranks, run_ranks_outcomes

__all__ = ["Outcome", "RanksFailed", "assert_same_parameters", "run_ranks", "run_ranks_outcomes"]
