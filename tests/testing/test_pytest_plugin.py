"""The pytest plugin: marked tests run on ranks, on threads and on processes alike."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import textwrap

import pytest

import ferro
from ferro_testing.pytest_ranks import check_backends

HEADER = "import time\nimport numpy as np\nimport pytest\n"


def run(tmp_path, text, *options):
    """Run pytest on a file as a user would; return what it prints, and its exit status."""
    (tmp_path / "test_user.py").write_text(HEADER + textwrap.dedent(text))
    plugins = ["-p", "no:cacheprovider"]
    if "ferro_testing_pytest" not in _registered():
        plugins += ["-p", "ferro_testing_pytest"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "test_user.py", *options, *plugins],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ended.stdout + ended.stderr, ended.returncode


def _registered():
    """Return the modules of the pytest plugins that installed distributions offer."""
    from importlib.metadata import entry_points

    return {entry.value for entry in entry_points(group="pytest11")}


BACKENDS = pytest.mark.parametrize("backend", ["simulated", "gloo"])


@BACKENDS
def test_one_file_runs_on_any_backend(tmp_path, backend):
    text, status = run(
        tmp_path,
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
        """,
        f"--ferro-backend={backend}",
    )
    assert status == 0, text
    for name in ("test_sum[{}-1]", "test_sum[{}-2]", "test_plain"):
        assert f"{name.format(backend)} PASSED" in text
    assert re.search(rf"test_arguments\[(2-{backend}-2|{backend}-2-2)\] PASSED", text), text


@BACKENDS
def test_every_failing_rank_is_named_with_its_traceback(tmp_path, backend):
    text, status = run(
        tmp_path,
        """
        @pytest.mark.ranks(3)
        def test_it(group):
            group.barrier()
            assert group.rank == 1, f"this is {group.rank}"
        """,
        f"--ferro-backend={backend}",
    )
    assert status == 1, text
    for rank in (0, 2):
        assert f"rank {rank}" in text
        assert f"this is {rank}" in text
    assert "this is 1" not in text
    assert "During handling" not in text


@BACKENDS
def test_a_rank_that_skips_skips_the_test(tmp_path, backend):
    text, status = run(
        tmp_path,
        """
        @pytest.mark.ranks(2)
        def test_it(group):
            if group.rank == 1:
                pytest.skip("not today")
            group.barrier()

        @pytest.mark.ranks(1)
        def test_xfail(group):
            pytest.xfail("some day")
        """,
        f"--ferro-backend={backend}",
        "-rsx",
    )
    assert status == 0, text
    assert "1 skipped, 1 xfailed" in text
    assert "not today" in text
    assert "some day" in text


@BACKENDS
def test_a_failure_counts_more_than_a_skip(tmp_path, backend):
    text, status = run(
        tmp_path,
        """
        @pytest.mark.ranks(2)
        def test_it(group):
            if group.rank == 0:
                pytest.skip("not today")
            assert not "wrong"
        """,
        f"--ferro-backend={backend}",
    )
    assert status == 1, text
    assert "AssertionError" in text


@BACKENDS
def test_a_stuck_rank_fails_the_test_at_its_deadline(tmp_path, backend):
    text, status = run(
        tmp_path,
        """
        @pytest.mark.ranks(2)
        def test_it(group):
            while group.rank == 1:
                time.sleep(0.01)  # stuck here
        """,
        f"--ferro-backend={backend}",
        "--ferro-timeout=1.5",
    )
    assert status == 1, text
    assert "did not end within 1.5 s" in text
    assert "rank 1" in text
    assert "test_it" in text.partition("did not end")[2]


def test_several_backends_make_a_test_each(tmp_path):
    body = "@pytest.mark.ranks(1)\ndef test_it(group): group.barrier()\n"
    text, status = run(tmp_path, body, "--ferro-backend=gloo,simulated", "--collect-only", "-q")
    assert status == 0, text
    assert "test_it[gloo-1]" in text
    assert "test_it[simulated-1]" in text


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


def test_without_marked_tests_no_backend_is_looked_at(tmp_path):
    text, status = run(tmp_path, "def test_it(): pass", "--ferro-backend=nowhere")
    assert status == 0, text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("@pytest.mark.ranks\ndef test_it(group): pass", "give numbers of ranks"),
        ("@pytest.mark.ranks(0)\ndef test_it(group): pass", "integers from 1"),
        ("@pytest.mark.ranks(2)\ndef test_it(): pass", "takes the argument `group`"),
        ("class TestIt:\n    @pytest.mark.ranks(2)\n    def test_it(self, group): pass", "not a method"),
    ],
)
def test_a_test_that_cannot_run_on_ranks_says_why(tmp_path, body, words):
    text, status = run(tmp_path, body)
    assert status != 0
    assert words in text
    assert "test_it" in text


def test_an_argument_that_cannot_travel_is_named(tmp_path):
    body = """
        @pytest.fixture
        def opened():
            return object()

        @pytest.mark.ranks(2)
        def test_it(group, opened):
            assert opened is not None
        """
    text, status = run(tmp_path, body, "--ferro-backend=gloo")
    assert status == 1, text
    assert "'opened' does not travel" in text
    text, status = run(tmp_path, body)
    assert status == 0, text  # threads share it


def test_the_plugin_imports_nothing_of_ferro_before_a_test_is_marked():
    program = "import sys, ferro_testing_pytest; sys.exit(bool({'ferro', 'numpy'} & {*sys.modules}))"
    path = os.pathsep.join([sysconfig.get_path("purelib"), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": path}
    assert subprocess.run([sys.executable, "-c", program], env=env, timeout=60).returncode == 0
