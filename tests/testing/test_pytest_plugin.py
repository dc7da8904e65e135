"""The pytest plugin: marked tests run on ranks, on threads and on processes alike."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import textwrap
from types import SimpleNamespace

import pytest

import ferro
from ferro_testing.pytest_ranks import check_backends
from ferro_testing_pytest import _backends

HEADER = "import time\nimport numpy as np\nimport pytest\n"
BOTH = "--ferro-backend=simulated,gloo"
BACKENDS = pytest.mark.parametrize("backend", ["simulated", "gloo"])


def run(folder, text, *options, alone=True):
    """Run pytest on a file as a user would; return what it prints, and its exit status.

    `alone` leaves out the plugins of other distributions, which take most of the time.
    """
    folder.mkdir(exist_ok=True)
    (folder / "test_user.py").write_text(HEADER + textwrap.dedent(text))
    plugins = ["-p", "no:cacheprovider"]
    environment = {**os.environ}
    if alone:
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if alone or "ferro_testing_pytest" not in _registered():
        plugins += ["-p", "ferro_testing_pytest"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "test_user.py", *options, *plugins],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ended.stdout + ended.stderr, ended.returncode


def _registered():
    """Return the modules of the pytest plugins that installed distributions offer."""
    from importlib.metadata import entry_points

    return {entry.value for entry in entry_points(group="pytest11")}


def report_of(text, test):
    """Return the part of pytest's output that tells the failure of a test."""
    parts = re.split(r"^_{3,} (test_\S+) _{3,}$|^={3,} short test summary", text, flags=re.MULTILINE)
    return parts[parts.index(test) + 1]


@pytest.fixture(scope="module")
def passing(tmp_path_factory):
    """The output of one run in which no test fails."""
    text, status = run(
        tmp_path_factory.mktemp("passing"),
        """
        @pytest.mark.ranks(1, 2)
        def test_sum(group):
            assert group.all_reduce(1) == group.world_size

        @pytest.fixture
        def ones():
            return np.ones(3, np.float32)

        @pytest.mark.ranks(2)
        @pytest.mark.parametrize("factor", [2])
        def test_arguments(group, ones, factor, tmp_path):
            assert tmp_path.is_dir()
            assert (group.all_reduce(ones * factor) == 4).all()

        def test_plain():
            assert True

        @pytest.mark.ranks(2)
        def test_skip(group):
            if group.rank == 1:
                pytest.skip("not today")
            group.barrier()

        @pytest.mark.ranks(1)
        def test_xfail(group):
            pytest.xfail("some day")
        """,
        BOTH,
        "-rsx",
        alone=False,
    )
    assert status == 0, text
    return text


@BACKENDS
def test_one_file_runs_on_any_backend(passing, backend):
    for name in ("test_sum[{}-1]", "test_sum[{}-2]", "test_plain"):
        assert f"{name.format(backend)} PASSED" in passing
    assert re.search(rf"test_arguments\[(2-{backend}-2|{backend}-2-2)\] PASSED", passing), passing


@BACKENDS
def test_a_rank_that_skips_skips_the_test(passing, backend):
    assert f"test_skip[{backend}-2] SKIPPED" in passing
    assert f"test_xfail[{backend}-1] XFAIL" in passing
    assert "2 skipped, 2 xfailed" in passing
    assert sum(int(count) for count in re.findall(r"^SKIPPED \[(\d+)\].*not today", passing, re.MULTILINE)) == 2
    assert re.search(rf"^XFAIL .*test_xfail\[{backend}-1\].*some day", passing, re.MULTILINE)


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """The output of one run in which every test fails."""
    text, status = run(
        tmp_path_factory.mktemp("failing"),
        """
        @pytest.mark.ranks(3)
        def test_it(group):
            group.barrier()
            assert group.rank == 1, f"this is {group.rank}"

        @pytest.mark.ranks(2)
        def test_skip(group):
            if group.rank == 0:
                pytest.skip("not today")
            assert not "wrong"
        """,
        BOTH,
    )
    assert status == 1, text
    assert "4 failed" in text
    return text


@BACKENDS
def test_every_failing_rank_is_named_with_its_traceback(failing, backend):
    text = report_of(failing, f"test_it[{backend}-3]")
    for rank in (0, 2):
        assert f"rank {rank}" in text
        assert f"this is {rank}" in text
    assert "this is 1" not in text
    assert "During handling" not in text


@BACKENDS
def test_a_failure_counts_more_than_a_skip(failing, backend):
    assert f"test_skip[{backend}-2] FAILED" in failing
    assert "AssertionError" in report_of(failing, f"test_skip[{backend}-2]")


def test_a_stuck_rank_fails_the_test_at_its_deadline(tmp_path):
    text, status = run(
        tmp_path,
        """
        @pytest.mark.ranks(2)
        def test_first(group):
            pass  # starts the server that forks the ranks, which may take longer than the deadline

        @pytest.mark.ranks(2)
        def test_it(group):
            while group.rank == 1:
                time.sleep(0.01)  # stuck here
        """,
        BOTH,
        "--ferro-timeout=3",
    )
    assert status == 1, text
    for backend in ("simulated", "gloo"):
        told = report_of(text, f"test_it[{backend}-2]")
        assert "did not end within 3 s" in told
        assert "rank 1" in told
        assert "test_it" in told.partition("did not end")[2]


@pytest.mark.parametrize(
    ("backend", "words"), [("nowhere", "no plugin that offers it is installed"), ("ucc", "cannot be used here")]
)
def test_a_backend_that_cannot_be_used_is_one_usage_error(tmp_path, backend, words):
    if backend == "ucc" and _usable("ucc"):
        pytest.skip("libucc is here")
    body = """
        @pytest.mark.ranks(1, 2, 3)
        def test_it(group):
            group.barrier()
        """
    text, status = run(tmp_path, body, f"--ferro-backend={backend}")
    assert status == pytest.ExitCode.USAGE_ERROR, text
    assert text.count("ERROR") == 1
    assert words in text


def test_a_probe_that_raises_is_told_as_any_other_reason(monkeypatch):
    def probe():
        raise RuntimeError("no wires here")

    info = ferro.BackendInfo(name="wires", summary="", probe=probe, create=print)
    monkeypatch.setattr(ferro.backends, "get", lambda name: info)
    with pytest.raises(pytest.UsageError, match="its probe raised RuntimeError: no wires here"):
        check_backends(["wires"])


def _usable(name):
    return ferro.backends.available()[name].ok


@pytest.mark.parametrize(
    ("given", "names"), [([], ["simulated"]), (["gloo, mpi", "gloo"], ["gloo", "mpi"]), (["cpu:gloo,cuda:nccl"],) * 2]
)
def test_simulated_ranks_are_the_default_and_backends_come_once_in_the_order_given(given, names):
    config = SimpleNamespace(getoption={"--ferro-backend": given}.__getitem__)
    assert _backends(config) == names


def test_without_marked_tests_no_backend_is_looked_at(tmp_path):
    text, status = run(tmp_path, "def test_it(): pass", "--ferro-backend=nowhere")
    assert status == 0, text


def test_a_test_that_cannot_run_on_ranks_says_why(tmp_path):
    words = {
        "@pytest.mark.ranks\ndef test_it(group): pass": "give numbers of ranks",
        "@pytest.mark.ranks(0)\ndef test_it(group): pass": "integers from 1",
        "@pytest.mark.ranks(2)\ndef test_it(): pass": "takes the argument `group`",
        "class TestIt:\n    @pytest.mark.ranks(2)\n    def test_it(self, group): pass": "not a method",
    }
    files = [f"test_{number}.py" for number in range(len(words))]
    for file, body in zip(files, words, strict=True):
        (tmp_path / file).write_text(HEADER + body)
    text, status = run(tmp_path, "", *files)
    assert status != 0
    reports = re.split(r"^_{3,} ERROR collecting (\S+) _{3,}$", text, flags=re.MULTILINE)
    for file, why in zip(files, words.values(), strict=True):
        told = reports[reports.index(file) + 1]
        assert why in told
        assert "test_it" in told


def test_an_argument_that_cannot_travel_is_named(tmp_path):
    body = """
        @pytest.fixture
        def opened():
            return object()

        @pytest.mark.ranks(2)
        def test_it(group, opened):
            assert opened is not None
        """
    text, status = run(tmp_path, body, BOTH)
    assert status == 1, text
    assert "'opened' does not travel" in report_of(text, "test_it[gloo-2]")
    assert "test_it[simulated-2] PASSED" in text  # threads share it


def test_the_plugin_imports_nothing_of_ferro_before_a_test_is_marked():
    program = "import sys, ferro_testing_pytest; sys.exit(bool({'ferro', 'numpy'} & {*sys.modules}))"
    path = os.pathsep.join([sysconfig.get_path("purelib"), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": path}
    assert subprocess.run([sys.executable, "-c", program], env=env, timeout=60).returncode == 0
