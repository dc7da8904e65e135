"""The conformance checks, which every backend must pass, as plain functions.

CASE = Case(backend="pipes", world_sizes=(1, 2, 3))

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_pipes_conforms(check):
    check(CASE)

`Case.unsupported` declares missing operations; `check_collective` is for authors of algorithms.
A check runs many calls in one run of the ranks and raises an AssertionError (or RanksFailed) that
names op, dtype, shape, root and rank of each mistake.
"""

from ferro_testing.algorithms import check_collective
from ferro_testing.buffers import check_allocate, check_buffers
from ferro_testing.case import Case, Runner, attempt, run_simulated
from ferro_testing.concurrency import check_async, check_groups, check_overlapping_groups
from ferro_testing.deadlines import check_send_deadline
from ferro_testing.differences import FEATURES, OPERATIONS
from ferro_testing.failures import check_abort, check_lost_peer, check_mismatch, check_timeout
from ferro_testing.movements import check_moved_dtypes, check_movements, check_uneven
from ferro_testing.objects import check_objects
from ferro_testing.prefixes import check_extrema, check_prefixes
from ferro_testing.random_reductions import check_random_reductions
from ferro_testing.reductions import check_deterministic, check_equal_bits, check_reduction_functions, check_reductions
from ferro_testing.refusals import check_unsupported, check_usage_errors
from ferro_testing.repetitions import check_exchange, check_persistent, check_repeated_calls
from ferro_testing.samples import DTYPES
from ferro_testing.shrinking import check_shrink
from ferro_testing.transfer_programs import check_transfer_programs
from ferro_testing.transfers import check_posted_transfers, check_tags, check_transfers

CHECKS = (
    check_reductions,
    check_reduction_functions,
    check_equal_bits,
    check_deterministic,
    check_random_reductions,
    check_prefixes,
    check_extrema,
    check_movements,
    check_moved_dtypes,
    check_uneven,
    check_repeated_calls,
    check_persistent,
    check_buffers,
    check_allocate,
    check_async,
    check_groups,
    check_overlapping_groups,
    check_transfers,
    check_tags,
    check_posted_transfers,
    check_exchange,
    check_transfer_programs,
    check_objects,
    check_usage_errors,
    check_unsupported,
    check_mismatch,
    check_timeout,
    check_send_deadline,
    check_lost_peer,
    check_abort,
    check_shrink,
)

__all__ = [
    "CHECKS",
    "DTYPES",
    "FEATURES",
    "OPERATIONS",
    "Case",
    "Runner",
    "attempt",
    "check_abort",
    "check_allocate",
    "check_async",
    "check_buffers",
    "check_collective",
    "check_deterministic",
    "check_equal_bits",
    "check_exchange",
    "check_extrema",
    "check_groups",
    "check_lost_peer",
    "check_mismatch",
    "check_moved_dtypes",
    "check_movements",
    "check_objects",
    "check_overlapping_groups",
    "check_persistent",
    "check_posted_transfers",
    "check_prefixes",
    "check_random_reductions",
    "check_reduction_functions",
    "check_reductions",
    "check_repeated_calls",
    "check_send_deadline",
    "check_shrink",
    "check_tags",
    "check_timeout",
    "check_transfer_programs",
    "check_transfers",
    "check_uneven",
    "check_unsupported",
    "check_usage_errors",
    "run_simulated",
]
