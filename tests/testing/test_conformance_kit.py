"""The kit itself: checks fail on wrong backends and say where; parity names parameters."""

import sys
import threading
import time

import numpy as np
import pytest

import ferro_testing.case
from ferro import Backend
from ferro.errors import PeerLost, UnsupportedError, UsageError
from ferro_testing import RanksFailed, assert_same_parameters, deadlines, failures, killing, refusals, transfers
from ferro_testing.buffers import check_buffers
from ferro_testing.case import Case, run_simulated
from ferro_testing.deadlines import check_send_deadline
from ferro_testing.failures import check_abort, check_lost_peer, check_mismatch, check_timeout
from ferro_testing.killing import JobEnded
from ferro_testing.movements import check_moved_dtypes, check_movements, check_uneven
from ferro_testing.outcome import Outcome
from ferro_testing.prefixes import check_extrema, check_prefixes
from ferro_testing.random_reductions import check_random_reductions
from ferro_testing.reductions import check_deterministic, check_equal_bits, check_reductions
from ferro_testing.refusals import check_unsupported
from ferro_testing.samples import DTYPES
from ferro_testing.shrinking import check_shrink
from ferro_testing.transfers import check_posted_transfers, check_tags, check_transfers


def sabotaged(spoil, **options):
    """Return a case whose ranks' backends are spoilt by `spoil(backend)`."""

    def runner(function, world_size, args, *, timeout_s, deterministic):
        def on_rank(group, *args):
            spoil(group._backend)
            return function(group, *args)

        return run_simulated(on_rank, world_size, args, timeout_s=timeout_s, deterministic=deterministic)

    options = {"backend": "spoilt", "world_sizes": (3,), "timeout_s": 5.0, **options}
    return Case(runner=runner, **options)


def wrong_last_element(backend):
    right = backend.all_reduce

    def all_reduce(buffer, reduction, *, deadline):
        right(buffer, reduction, deadline=deadline)
        if backend.rank == 2 and buffer.size >= 7:
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


def round_every_step(backend):
    right = backend.all_reduce

    def all_reduce(buffer, reduction, *, deadline):
        if buffer.dtype == np.float16 and reduction.name in ("sum", "mean"):
            rows = np.empty(backend.world_size * buffer.size, buffer.dtype)
            rows[backend.rank * buffer.size :][: buffer.size] = buffer
            backend.all_gather(rows, [buffer.size] * backend.world_size, deadline=deadline)
            with np.errstate(all="ignore"):
                buffer[...] = getattr(rows.reshape(-1, buffer.size), reduction.name)(axis=0, dtype=np.float16)
        else:
            right(buffer, reduction, deadline=deadline)

    backend.all_reduce = all_reduce


def lose_the_last_row(backend):
    right = backend.all_to_all

    def all_to_all(source, out, *counts, deadline):
        right(source, out, *counts, deadline=deadline)
        out[-1:] = 0

    backend.all_to_all = all_to_all


def forget_what_was_posted(backend):
    right = backend.posted_transfers

    def posted_transfers():
        posted = right()
        begin = posted.irecv
        posted.irecv = lambda *args, **options: begin(*args, **options) if options["tag"] != 1 else None
        return posted

    backend.posted_transfers = posted_transfers


def agree_to_anything(backend):
    backend.agree = lambda call, *, deadline: setattr(backend, "call", call)


@pytest.mark.parametrize(
    ("check", "spoil", "words"),
    [
        (
            check_reductions,
            wrong_last_element,
            r"(?s)_reduce_everything on 3 ranks of spoilt:\nrank 2: all_reduce bool\[7\] op=prod: "
            r"1 of 7 elements differ; element 6 is True, not False.*rank 2: and \d+ more",
        ),
        (check_movements, broadcast_nothing, r"rank \d: broadcast bool\[\] root=\d"),
        (check_equal_bits, differ_by_rank, "of 1000 float32: ranks have different bits"),
        (check_prefixes, lose_the_last_row, r"rank \d: scan of \d+ bool op="),
        (check_extrema, lose_the_last_row, r"rank \d: min_loc of \d+ \w+"),
        (check_moved_dtypes, lose_the_last_row, r"rank \d: all_to_all of datetime64"),
        (check_posted_transfers, forget_what_was_posted, "posted transfers have not ended"),
        (check_deterministic, differ_by_rank, "rank 1: all_reduce of 900 float32 op=sum in order"),
    ],
)
def test_a_wrong_result_is_told_with_op_dtype_shape_and_rank(check, spoil, words, monkeypatch):
    monkeypatch.setattr(transfers, "_POSTED_S", 0.5)
    with pytest.raises(AssertionError, match=words):
        check(sabotaged(spoil, dtypes=("bool", "float32")))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (round_every_step, r"all_reduce of \d+ float16 op=(sum|mean), seed 0, number \d+: "),
        (differ_by_rank, "ranks have different bits"),
    ],
)
def test_wrong_sums_of_random_numbers_are_told_with_seed_and_number(spoil, words):
    with pytest.raises(AssertionError, match=words):
        check_random_reductions(sabotaged(spoil, dtypes=("float16", "float32")), runs=80)


def test_a_backend_that_writes_to_its_input_is_found_out():
    with pytest.raises((AssertionError, RanksFailed), match=r"gather|read-only"):
        check_buffers(sabotaged(modify_the_input))


def test_a_backend_that_compares_no_calls_is_found_out():
    with pytest.raises(AssertionError, match="mismatch of root: rank 0 raised"):
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
    with pytest.raises(RanksFailed, match=r"(?s)declare it with the reason.*no native all_to_all"):
        check_movements(sabotaged(refuse_all_to_all, dtypes=("float32",)))


def refuse_to_reduce(dtype="", name=""):
    def spoil(backend):
        right = backend.all_reduce

        def all_reduce(buffer, reduction, *, deadline):
            if dtype in ("", buffer.dtype.name) and name in ("", reduction.name):
                raise UnsupportedError(f"no {dtype} {name} here")
            right(buffer, reduction, deadline=deadline)

        backend.all_reduce = all_reduce

    return spoil


@pytest.mark.parametrize(
    ("key", "spoil"),
    [
        ("all_reduce:float16", refuse_to_reduce(dtype="float16")),
        ("all_reduce:bxor", refuse_to_reduce(name="bxor")),
        ("all_reduce:int8:prod", refuse_to_reduce("int8", "prod")),
    ],
)
def test_a_difference_may_be_one_of_dtype_and_reduction(key, spoil):
    dtypes = ("int8", "float16", "float32")
    declared = sabotaged(spoil, unsupported={key: "no such kernel"}, dtypes=dtypes)
    check_reductions(declared)
    check_unsupported(declared)
    with pytest.raises(RanksFailed, match="UnsupportedError from what is not declared"):
        check_reductions(sabotaged(spoil, dtypes=dtypes))


@pytest.mark.parametrize(
    "key",
    [
        *("all_to_all", "barrier", "send", "recv", "sendrecv", "split", "subgroup"),
        *("all_reduce:float16", "reduce:bxor", "functions", "uneven", "shrink", "deterministic"),
    ],
)
def test_what_is_declared_and_works_is_a_failure(key, monkeypatch):
    monkeypatch.setattr(refusals, "_SHORT_S", 0.3)
    case = Case(backend="simulated", world_sizes=(2,), unsupported={key: "says who?"})
    name = key if key != "recv" else "recv is declared unsupported, but raised CollectiveTimeout"
    with pytest.raises(AssertionError, match=f"{name}.* is declared unsupported, but|{name}"):
        check_unsupported(case)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("all_to_some", "names 'all_to_some'; there are: all_reduce, "),
        ("lost_peer:float32", "names 'lost_peer:float32'; there are"),
        ("all_reduce:float", "all_reduce has: bool"),
        ("broadcast:sum", "broadcast has: bool"),
    ],
)
def test_a_key_that_names_nothing_is_an_error(key, words):
    with pytest.raises(UsageError, match=words):
        Case(backend="simulated", unsupported={key: "a reason"})
    with pytest.raises(UsageError, match="give the reason for 'abort'"):
        Case(backend="simulated", unsupported={"abort": " "})


def ignore_tags(backend):
    """Let messages of users pass for one another, whatever their tags."""
    send, recv = backend.send, backend.recv

    def one_for_all(tag):
        return 0 if tag <= 7 else tag  # collectives have greater ones

    backend.send = lambda buffer, peer, *, tag, deadline: send(buffer, peer, tag=one_for_all(tag), deadline=deadline)
    backend.recv = lambda buffer, peer, *, tag, deadline: recv(buffer, peer, tag=one_for_all(tag), deadline=deadline)


def test_messages_that_overtake_each_other_are_found_out():
    check_transfers(sabotaged(ignore_tags, dtypes=("float32",)))
    # Which message comes first is chance: the check finds wrong numbers, or the ranks a wrong size.
    with pytest.raises((AssertionError, RanksFailed), match=r"recv of \[.*\] from rank \d, tag 7|CollectiveMismatch"):
        check_tags(sabotaged(ignore_tags))
    check_tags(sabotaged(ignore_tags, unsupported={"tags": "messages come as they are sent"}))


def lose_data_after_shrink(backend):
    shrink = backend.shrink

    def shrunk(ranks, context):
        made = shrink(ranks, context)
        right = made.all_reduce

        def all_reduce(buffer, reduction, *, deadline):
            right(buffer, reduction, deadline=deadline)
            buffer[-1:] = 0

        made.all_reduce = all_reduce
        return made

    backend.shrink = shrunk


def cannot_shrink(backend):
    backend.shrink = lambda ranks, context: Backend.shrink(backend, ranks, context)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_ranks_that_are_left_must_compute_right(ranks):
    check_shrink(Case(backend="simulated", world_sizes=(ranks,)))
    with pytest.raises(AssertionError, match=r"rank 0: all_reduce of \[7\] among \d left"):
        check_shrink(sabotaged(lose_data_after_shrink, world_sizes=(ranks,)))


def test_who_cannot_shrink_declares_it():
    with pytest.raises(RanksFailed, match=r"declare it.*\n(.*\n)*.*SimulatedBackend cannot go on"):
        check_shrink(sabotaged(cannot_shrink))
    declared = sabotaged(cannot_shrink, unsupported={"shrink": "connections end with the group"})
    check_shrink(declared)
    check_unsupported(declared)


def test_a_launcher_that_ends_the_job_with_a_rank_is_told_from_a_wrong_backend():
    def runner(function, world_size, args, *, timeout_s, deterministic):
        return [Outcome(rank=rank, error_type="Killed") for rank in range(world_size)]

    case = Case(backend="launched", world_sizes=(3,), runner=runner)
    for check in (check_lost_peer, check_shrink):
        with pytest.raises(JobEnded, match=r"ranks \[0, 2\] ended with them"):
            check(case)


def deaf_to_abort(backend):
    backend.abort = lambda: None


def forget_a_row(backend):
    right = backend.all_gather

    def all_gather(buffer, counts, *, deadline):
        right(buffer, counts, deadline=deadline)
        if len(set(counts)) > 1:
            buffer[-1:] = 9

    backend.all_gather = all_gather


@pytest.mark.parametrize(("check", "spoil", "words"), [(check_uneven, forget_a_row, "all_gather sizes growing")])
def test_more_that_can_go_wrong_is_found_out(check, spoil, words):
    with pytest.raises(AssertionError, match=words):
        check(sabotaged(spoil))


def test_a_backend_that_is_deaf_to_abort_is_found_out(monkeypatch):
    monkeypatch.setattr(failures, "_WAKE_S", 0.3)
    with pytest.raises(AssertionError, match=r"rank 1 was not woken: it waited 0\.\d s"):
        check_abort(sabotaged(deaf_to_abort))


def deaf_to_its_deadline(backend):
    def send(_buffer, _peer, *, tag, deadline):
        assert tag == 0
        threading.Event().wait(deadline + 0.5 - time.monotonic())

    backend.send = send


def fail_to_send(backend):
    def send(_buffer, peer, *, tag, deadline):
        raise PeerLost("the wire broke", peer=peer)

    backend.send = send


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (deaf_to_its_deadline, r"it took \d\.\d s, with timeout_s=0\.1: does `send` wait by its"),
        (fail_to_send, "a send that nobody receives, on 3 ranks of spoilt: rank 0 raised PeerLost"),
    ],
)
def test_a_send_that_does_not_end_by_its_deadline_is_found_out(monkeypatch, spoil, words):
    monkeypatch.setattr(deadlines, "_SHORT_S", 0.1)
    check_send_deadline(Case(backend="simulated", world_sizes=(2,)))
    monkeypatch.setattr(killing, "_PATIENCE_S", 0.5)
    with pytest.raises(AssertionError, match=words):
        check_send_deadline(sabotaged(spoil))
    check_send_deadline(sabotaged(spoil, unsupported={"send": "no transfers"}))


def test_bfloat16_is_left_out_where_ml_dtypes_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    case = Case(backend="simulated", world_sizes=(2,))
    assert case.dtypes == tuple(name for name in DTYPES if name != "bfloat16")
    check_reductions(case)
    check_equal_bits(case)
    given = sabotaged(
        refuse_all_to_all, unsupported={"all_to_all:bfloat16": "no such kernel", "all_to_all": "no native op"}
    )
    check_unsupported(given)


def refuse_on_one_rank(backend):
    if backend.rank == 1:
        refuse_all_to_all(backend)


def test_what_one_rank_refuses_is_not_to_be_declared():
    with pytest.raises(RanksFailed) as caught:
        check_movements(sabotaged(refuse_on_one_rank, dtypes=("float32",)))
    words = "UnsupportedError on ranks [1] only, ranks [0, 2] did not refuse"
    assert words in str(caught.value)
    assert "declare it" not in str(caught.value)


def test_a_case_passes_its_options_on(monkeypatch):
    given = {}

    def run(function, world_size, **options):
        given.update(options)
        return [Outcome(rank=rank, result=[]) for rank in range(world_size)]

    monkeypatch.setattr(ferro_testing.case, "run_ranks_outcomes", run)
    case = Case(
        backend="pipes",
        world_sizes=(3,),
        init_options={"algorithms": {"all_reduce": "ring"}},
        backend_options={"depth": 2},
        launcher=lambda ranks: ("mpiexec", "-n", str(ranks)),
        python="python3",
        timeout_s=7,
    )
    check_movements(case)
    assert given["init_options"] == {
        "deterministic": False,
        "algorithms": {"all_reduce": "ring"},
        "backend_options": {"depth": 2},
    }
    assert given["launcher"] == ("mpiexec", "-n", "3")
    assert (given["backend"], given["python"], given["timeout_s"]) == ("pipes", "python3", 7)


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
        ({"weight": np.array([1.0, 2.0]), "bias": np.ones(1)}, "rank 1: bias: not there in one process"),
    ],
)
def test_parity_names_rank_and_parameter(other, words):
    reference = {"weight": np.array([1.0, 2.0])}
    with pytest.raises(AssertionError, match=words):
        assert_same_parameters(reference, [reference, other])
