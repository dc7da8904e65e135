"""run_ranks: real processes, a third-party backend, every rank's words, and nobody left behind."""

import os
import signal
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from ferro.errors import UsageError
from ferro_testing import RanksFailed, run_ranks, run_ranks_outcomes
from ferro_testing.concurrency import check_groups
from ferro_testing.conformance import Case
from ferro_testing.objects import check_objects

# A backend as a third party would write it, with the job's store for a network.
POSTBOX = """
    from collections import Counter

    import numpy as np
    from ferro import Availability, Backend, BackendInfo, hookimpl

    class Postbox(Backend):
        def __init__(self, config):
            super().__init__(config.rank, config.world_size, config.choice)
            self.store = config.store
            self.numbers = Counter()

        def key(self, source, target, tag):
            self.numbers[source, target, tag] += 1
            return f"{source}/{target}/{tag}/{self.numbers[source, target, tag]}"

        def send(self, buffer, peer, *, tag, deadline):
            self.store.set(self.key(self.rank, peer, tag), buffer.tobytes())

        def recv(self, buffer, peer, *, tag, deadline):
            message = self.store.get(self.key(peer, self.rank, tag), deadline=deadline)
            buffer[...] = np.frombuffer(message, buffer.dtype)

        def close(self):
            pass

    def probe():
        return Availability(ok=True)

    @hookimpl
    def ferro_backends():
        return [BackendInfo(name="postbox", summary="slow", probe=probe, create=Postbox)]
"""


@pytest.fixture(autouse=True, scope="module")
def installed_postbox(tmp_path_factory):
    """Install the distribution ferro-postbox where the processes find it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "ferro_postbox.py").write_text(textwrap.dedent(POSTBOX))
    info = folder / "ferro_postbox-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ferro-postbox\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ferro]\npostbox = ferro_postbox\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


def describe(group, factor, options):
    total = group.all_reduce(np.full(3, factor))
    variables = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MINE")]
    return {
        "total": total,
        "variables": variables,
        "options": options,
        "timeout_s": group.timeout_s,
        "main thread": threading.current_thread() is threading.main_thread(),
    }


def test_results_come_back_by_rank_as_they_were():
    results = run_ranks(
        describe,
        2,
        backend="postbox",
        args=(2.5, {"a": [1, None, "b"]}),
        init_options={"timeout_s": 7.0},
        env={"MINE": "yes"},
    )
    for rank, result in enumerate(results):
        np.testing.assert_array_equal(result.pop("total"), np.full(3, 5.0))
        assert result == {
            "variables": [str(rank), "2", str(rank), "yes"],
            "options": {"a": [1, None, "b"]},
            "timeout_s": 7.0,
            "main thread": True,
        }


def test_variables_may_differ_by_rank():
    results = run_ranks(describe, 2, backend="postbox", args=(1.0, {}), env=lambda rank: {"MINE": f"rank {rank}"})
    assert [result["variables"][3] for result in results] == ["rank 0", "rank 1"]


@pytest.mark.parametrize("check", [check_objects, check_groups])
def test_the_checks_run_on_processes(check):
    check(Case(backend="postbox", world_sizes=(2,)))


def fail_on_rank_1(group):
    print("this is rank", group.rank)
    print("and its warning", file=sys.stderr)
    if group.rank == 1:
        raise LookupError("the first cause")
    group.all_reduce(1, timeout_s=0.2)


def test_a_failure_shows_every_ranks_traceback_the_first_cause_first():
    with pytest.raises(RanksFailed) as caught:
        run_ranks(fail_on_rank_1, 2, backend="postbox")
    text = str(caught.value)
    assert "fail_on_rank_1 on 2 ranks of postbox: 2 of 2 ranks failed; rank 1 was first" in text
    cause = text.index("--- rank 1: LookupError")
    follow = text.index("--- rank 0: CollectiveTimeout")
    assert cause < text.index('raise LookupError("the first cause")') < follow
    assert follow < text.index("did not arrive: rank 1")
    for rank in range(2):
        assert f"this is rank {rank}\n" in caught.value.outcomes[rank].output
        assert "and its warning" in caught.value.outcomes[rank].output


def end_in_many_ways(group):
    if group.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if group.rank == 1:
        os._exit(3)
    if group.rank == 2:
        sys.exit("goodbye")
    return "well"


def test_outcomes_tell_how_each_rank_ended():
    killed, left, gone, well = run_ranks_outcomes(end_in_many_ways, 4, backend="postbox")
    assert (killed.error_type, killed.signal, killed.exit_code) == ("Killed", "SIGKILL", None)
    assert (left.error_type, left.signal, left.exit_code) == ("Exited", "", 3)
    assert (gone.error_type, gone.exit_code) == ("SystemExit", 1)
    assert "goodbye" in gone.error_text
    assert (well.ok, well.result, well.exit_code) == (True, "well", 0)
    assert [outcome.rank for outcome in (killed, left, gone, well)] == [0, 1, 2, 3]


def hang_on_rank_0(group):
    print(f"pid={os.getpid()}", flush=True)
    if group.rank == 0:
        threading.Event().wait(60)


def test_at_the_deadline_a_rank_is_ended_and_its_stack_is_shown():
    late, well = run_ranks_outcomes(hang_on_rank_0, 2, backend="postbox", timeout_s=8.0)
    assert (well.ok, late.error_type) == (True, "Late")
    assert "did not end within 8 s" in late.error_text
    assert "hang_on_rank_0" in late.output.partition("most recent call first")[2]
    for outcome in (late, well):
        pid = int(outcome.output.partition("pid=")[2].split()[0])
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def return_something_odd(group):
    return object()


def test_a_result_that_cannot_travel_is_the_ranks_error():
    with pytest.raises(RanksFailed, match="value is a object, which has no safe encoding"):
        run_ranks(return_something_odd, 1, backend="postbox")


def test_an_unknown_backend_is_told_with_the_ranks_traceback():
    with pytest.raises(RanksFailed, match="BackendUnavailable: backend 'pigeons' cannot be used"):
        run_ranks(return_something_odd, 1, backend="pigeons")


class Holder:
    def method(self, group):
        pass


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda group: None, "<lambda> cannot be sent to other processes"),
        (Holder().method, "Holder.method cannot be sent"),
        (Holder.method, "Holder.method cannot be sent"),
        (print, "print cannot be sent"),
        (Holder(), "cannot be sent"),
    ],
    ids=["lambda", "bound method", "method", "builtin", "object"],
)
def test_only_functions_that_can_be_found_again_are_taken(function, words):
    with pytest.raises(UsageError, match=words):
        run_ranks(function, 1, backend="postbox")


def test_a_closure_is_refused():
    def inner(group):
        return words

    words = "which load it by file and name: give a function defined at the top level of a file"
    with pytest.raises(UsageError, match=words):
        run_ranks(inner, 1, backend="postbox")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"world_size": 0}, "world_size must be at least 1, not 0"),
        ({"timeout_s": 0.0}, "timeout_s must be positive"),
        ({"args": (object(),)}, r"value\['args'\]\[0\] is a object, which has no safe encoding"),
    ],
    ids=["world_size", "timeout_s", "args"],
)
def test_wrong_arguments_are_refused_before_a_process_starts(options, words):
    with pytest.raises(UsageError, match=words):
        run_ranks(return_something_odd, **{"world_size": 1, "backend": "postbox", **options})


def launcher(count):
    return (sys.executable, str(Path(__file__).with_name("launcher.py")), str(count))


def test_a_launcher_starts_the_ranks_which_find_each_other_as_under_it():
    results = run_ranks(describe, 2, backend="postbox", args=(2.5, {}), env={"MINE": "yes"}, launcher=launcher(2))
    for result in results:
        np.testing.assert_array_equal(result["total"], np.full(3, 5.0))
        assert result["variables"] == [None, None, None, "yes"]
        assert result["timeout_s"] == 60.0


def test_under_a_launcher_each_ranks_end_and_words_are_told():
    outcomes = run_ranks_outcomes(fail_on_rank_1, 2, backend="postbox", launcher=launcher(2), timeout_s=20)
    assert [outcome.error_type for outcome in outcomes] == ["CollectiveTimeout", "LookupError"]
    assert [outcome.exit_code for outcome in outcomes] == [1, 1]
    for rank in range(2):
        assert outcomes[rank].output.startswith(f"this is rank {rank}\n")


def kill_rank_1(group):
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "well"


def test_under_a_launcher_a_rank_without_a_report_was_killed():
    well, killed = run_ranks_outcomes(kill_rank_1, 2, backend="postbox", launcher=launcher(2))
    assert (well.ok, well.result, well.exit_code) == (True, "well", 0)
    assert (killed.error_type, killed.signal, killed.exit_code) == ("Killed", "SIGKILL", None)


def test_under_a_launcher_a_late_rank_shows_its_stack_and_is_ended():
    late, well = run_ranks_outcomes(hang_on_rank_0, 2, backend="postbox", launcher=launcher(2), timeout_s=8.0)
    assert (well.ok, late.error_type) == (True, "Late")
    assert "hang_on_rank_0" in late.output.partition("most recent call first")[2]
    for outcome in (late, well):
        pid = int(outcome.output.partition("pid=")[2].split()[0])
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_launcher_that_cannot_start_ranks_is_told_with_its_words():
    command = (sys.executable, "-c", "raise SystemExit('no such host')")
    with pytest.raises(RanksFailed, match=r"(?s)exit status 1.*no such host"):
        run_ranks(kill_rank_1, 1, backend="postbox", launcher=command)


def test_variables_cannot_differ_by_rank_under_a_launcher():
    with pytest.raises(UsageError, match="gives all ranks the same variables"):
        run_ranks(kill_rank_1, 1, backend="postbox", launcher=launcher(1), env=lambda _: {})
