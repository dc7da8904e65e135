"""The kit itself: checks fail on wrong backends and say where; parity names parameters."""

import numpy as np
import pytest

from ferro.errors import UnsupportedError
from ferro.testing import RanksFailed, assert_same_parameters
from ferro.testing.buffers import check_buffers
from ferro.testing.case import Case, run_simulated
from ferro.testing.failures import check_lost_peer, check_mismatch, check_timeout
from ferro.testing.movements import check_movements
from ferro.testing.outcome import Outcome
from ferro.testing.reductions import check_deterministic, check_equal_bits, check_reductions
from ferro.testing.refusals import check_unsupported


def sabotaged(spoil, **options):
    """Return a case whose ranks' backends are spoilt by `spoil(backend)`."""

    def runner(function, world_size, args, *, timeout_s, deterministic):
        def on_rank(group, *args):
            spoil(group._backend)
            return function(group, *args)

        return run_simulated(
            on_rank, world_size, args, timeout_s=timeout_s, deterministic=deterministic
        )

    options = {"backend": "spoilt", "world_sizes": (3,), "timeout_s": 5.0, **options}
    return Case(runner=runner, **options)


def wrong_last_element(backend):
    right = backend.all_reduce

    def all_reduce(buffer, reduction, *, deadline):
        right(buffer, reduction, deadline=deadline)
        if backend.rank == 2 and buffer.size == 7:
            buffer[-1] = ~buffer[-1] if buffer.dtype.kind in "biu" else buffer[-1] + 1

    backend.all_reduce = all_reduce


def broadcast_nothing(backend):
    right = backend.broadcast

    def broadcast(buffer, root, *, deadline):
        if buffer.dtype.kind not in "bf":  # scatter's own small broadcasts go on
            right(buffer, root, deadline=deadline)

    backend.broadcast = broadcast


def modify_the_input(backend):
    def gather(block, out, counts, root, *, deadline):
        block[...] = 0

    backend.gather = gather


def differ_by_rank(backend):
    right = backend.all_reduce

    def all_reduce(buffer, reduction, *, deadline):
        right(buffer, reduction, deadline=deadline)
        if buffer.size > 100 and backend.rank == 1:
            buffer[0] = np.nextafter(buffer[0], np.inf, dtype=buffer.dtype)

    backend.all_reduce = all_reduce


def agree_to_anything(backend):
    backend.agree = lambda call, *, deadline: setattr(backend, "call", call)


@pytest.mark.parametrize(
    ("check", "spoil", "words"),
    [
        (
            check_reductions,
            wrong_last_element,
            r"(?s)_reduce_everything on 3 ranks of spoilt:\nrank 2: all_reduce bool\[7\] op=sum: "
            r"1 of 7 elements differ; element 6 is False, not True.*rank 2: and \d+ more",
        ),
        (check_movements, broadcast_nothing, r"rank \d: broadcast bool\[\] root=\d"),
        (check_equal_bits, differ_by_rank, "of 1000 float32: ranks have different bits"),
        (check_deterministic, differ_by_rank, "rank 1: all_reduce of 900 float32 op=sum in order"),
    ],
)
def test_a_wrong_result_is_told_with_op_dtype_shape_and_rank(check, spoil, words):
    with pytest.raises(AssertionError, match=words):
        check(sabotaged(spoil, dtypes=("bool", "float32")))


def test_a_backend_that_writes_to_its_input_is_found_out():
    with pytest.raises((AssertionError, RanksFailed), match=r"gather|read-only"):
        check_buffers(sabotaged(modify_the_input))


def test_a_backend_that_compares_no_calls_is_found_out():
    with pytest.raises(AssertionError, match="mismatch of op: rank 0 raised"):
        check_mismatch(sabotaged(agree_to_anything, world_sizes=(2,), timeout_s=1.0))


@pytest.mark.parametrize("check", [check_timeout, check_lost_peer])
def test_failures_are_not_checked_where_nobody_could_notice(check):
    check(Case(backend="nowhere", world_sizes=(1,)))


def refuse_all_to_all(backend):
    def all_to_all(*_args, **_options):
        raise UnsupportedError("no native all_to_all")

    backend.all_to_all = all_to_all


def test_what_is_declared_unsupported_is_proven_and_left_out():
    declared = {"all_to_all": "no native op"}
    case = sabotaged(refuse_all_to_all, unsupported=declared, dtypes=("float32",))
    check_unsupported(case)
    check_movements(case)
    with pytest.raises(RanksFailed, match="no native all_to_all"):
        check_movements(sabotaged(refuse_all_to_all, dtypes=("float32",)))
    with pytest.raises(AssertionError, match="all_to_all is declared unsupported, but works"):
        check_unsupported(Case(backend="simulated", unsupported=declared))
    with pytest.raises(AssertionError, match="unsupported names 'all_to_some'; there are"):
        check_unsupported(Case(backend="simulated", unsupported={"all_to_some": ""}))


def test_ranks_failed_puts_causes_before_consequences():
    outcomes = [
        Outcome(rank=0, error_type="PeerLost", error_text="lost", ended_s=1.0),
        Outcome(rank=1),
        Outcome(rank=2, error_type="KeyError", error_text="second", ended_s=3.0),
        Outcome(rank=3, error_type="ValueError", error_text="first", ended_s=2.0),
        Outcome(rank=4, error_type="Late", error_text="late", ended_s=0.0),
    ]
    error = RanksFailed("a run", outcomes)
    assert str(error).startswith("a run: 4 of 5 ranks failed; rank 3 was first\n--- rank 3:")
    order = [line.split()[2] for line in str(error).splitlines() if line.startswith("---")]
    assert order == ["3:", "2:", "0:", "4:", "1:"]
    assert [outcome.rank for outcome in error.outcomes] == [0, 1, 2, 3, 4]


def test_parity_passes_within_its_tolerance():
    reference = {"weight": np.array([1.0, 100.0]), "empty": np.empty(0)}
    near = {"weight": np.array([1.001, 100.0]), "empty": np.empty(0)}
    assert_same_parameters(reference, [reference, near], rtol=1e-4)
    assert_same_parameters(reference, [near], atol=0.01)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"weight": np.array([1.0, 2.5])}, "rank 1: weight: largest difference 0.5, allowed 0"),
        ({"weight": np.array([1.0, np.nan])}, "rank 1: weight: largest difference nan"),
        ({"weight": np.ones(3)}, r"rank 1: weight: float64\(3,\) in place of float64\(2,\)"),
        ({"weight": np.ones(2, np.float32)}, r"rank 1: weight: float32\(2,\) in place"),
        ({}, "rank 1: weight: only there in one process"),
        (
            {"weight": np.array([1.0, 2.0]), "bias": np.ones(1)},
            "rank 1: bias: not there in one process",
        ),
    ],
)
def test_parity_names_rank_and_parameter(other, words):
    reference = {"weight": np.array([1.0, 2.0])}
    with pytest.raises(AssertionError, match=words):
        assert_same_parameters(reference, [reference, other])
