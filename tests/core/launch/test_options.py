"""The command line of `ferro run`: options, defaults from Kubeflow, mistakes."""

import resource
import tempfile
from pathlib import Path

import pytest

from ferro.errors import UsageError
from ferro.launch.options import parse_options
from ferro.launch.trace import merge_parts, parts_directory

from .conftest import ferro

PET = {
    "PET_NNODES": "4",
    "PET_NODE_RANK": "3",
    "PET_NPROC_PER_NODE": "2",
    "PET_MASTER_ADDR": "trainer-0",
    "PET_MASTER_PORT": "29400",
}


def test_defaults() -> None:
    options = parse_options([__file__], {})
    assert (options.nproc_per_node, options.nnodes, options.node_rank) == (1, 1, 0)
    assert options.world_size == 1
    assert options.python_arguments() == [__file__]


@pytest.mark.parametrize("given", [["-n", "3"], ["-n3"], ["-np", "3"], ["-np=3"], ["--nproc-per-node", "3"]])
def test_the_number_of_ranks_is_written_as_for_other_launchers(given: list[str]) -> None:
    options = parse_options([*given, __file__, "-np", "7"], {})
    assert (options.nproc_per_node, options.arguments) == (3, ("-np", "7"))


def test_kubeflow_gives_defaults_and_options_beat_them() -> None:
    options = parse_options([__file__], PET)
    assert (options.nproc_per_node, options.nnodes, options.node_rank) == (2, 4, 3)
    assert options.endpoint == ("trainer-0", 29400)
    options = parse_options(
        ["-n", "5", "--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "[::1]:7", __file__], PET
    )
    assert (options.world_size, options.node_rank, options.endpoint) == (10, 0, ("::1", 7))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a program to run"),
        (["--frobnicate", __file__], "--frobnicate"),
        (["-n", "many", __file__], "'many'"),
        (["-n", "0", __file__], "-n 0"),
        (["-n", "2000000", __file__], "2000000 ranks"),
        (["--nnodes", "0", __file__], "--nnodes 0"),
        (["--nnodes", "2", __file__], "--rdzv-endpoint"),
        (["--nnodes", "2", "--rdzv-endpoint", "nowhere", __file__], "'nowhere'"),
        (["--node-rank", "1", __file__], "--node-rank 1 is out of range"),
        (["--node-rank", "-1", __file__], "--node-rank -1 is out of range"),
        (["--max-restarts", "-1", __file__], "--max-restarts -1"),
        (["--timeout-s", "nan", __file__], "--timeout-s nan"),
        (["--timeout-s", "0", __file__], "--timeout-s 0"),
        (["--grace-s", "-1", __file__], "--grace-s -1"),
        (["/"], "'/' is a directory without a file __main__.py"),
        (["-np", "two", __file__], "'two'"),
        (["python", __file__], "ferro run starts Python itself: leave 'python' away"),
        (["-m", "no_such_module.at_all"], "there is no module 'no_such_module.at_all'"),
        (["--nproc", "2", __file__], "--nproc"),
        (["no/such/file.py"], "no/such/file.py"),
        (["--trace", "no/such/directory/t.json", __file__], "no/such/directory"),
    ],
)
def test_mistakes_are_named(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(arguments, {})
    assert words in str(caught.value)


def test_mpiexec_spells_the_number_of_ranks_otherwise() -> None:
    assert parse_options(["-np", "3", __file__, "-np", "5"], {}).nproc_per_node == 3


def test_run_help_names_the_options(tmp_path: Path) -> None:
    result = ferro("run", "--help")
    assert result.returncode == 0
    for option in ("--nproc-per-node", "--rdzv-endpoint", "--max-restarts", "--trace", "PET_"):
        assert option in result.stdout


def test_too_few_open_files_are_named_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "p.py"
    program.touch()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 1024))
    assert parse_options(["-n", "4", str(program)], {}).nproc_per_node == 4
    with pytest.raises(UsageError, match=r"-n 8 takes about 60 open files, and the limit is 40: .*ulimit -n 60"):
        parse_options(["-n", "8", str(program)], {})


def test_without_a_temporary_directory_a_trace_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(UsageError, match=r"--trace needs a temporary directory: .*TMPDIR"):
        parts_directory()


def test_a_program_that_starts_itself_does_not_multiply_without_end(monkeypatch):
    monkeypatch.setenv("FERRO_NESTED", "2")
    parse_options(["-n", "1", __file__])  # a rank may start another job
    monkeypatch.setenv("FERRO_NESTED", "3")
    with pytest.raises(UsageError, match="does the program start itself"):
        parse_options(["-n", "1", __file__])


def test_a_trace_replaces_neither_a_link_nor_a_device(tmp_path):
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    link.symlink_to(target)
    merge_parts(tmp_path, [], link)
    assert link.is_symlink()
    assert target.read_text() == '{"traceEvents": []}'
    assert merge_parts(tmp_path, [], Path("/dev/null")) == []
    assert Path("/dev/null").is_char_device()
