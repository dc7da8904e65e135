"""The command line: options, defaults from Kubeflow, mistakes; and the other commands."""

import json
from pathlib import Path

import pytest

from ferro.cli.main import main as cli
from ferro.errors import UsageError
from ferro.launch import parse_options
from ferro.types import Availability

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
        (["--nproc", "2", __file__], "--nproc"),
        (["no/such/file.py"], "no/such/file.py"),
        (["--trace", "no/such/directory/t.json", __file__], "no/such/directory"),
    ],
)
def test_mistakes_are_named(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(arguments, {})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [["run", "-n", "0", __file__], ["frob"], ["run", "--log-dir", __file__, __file__]]
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("ferro: ")
    assert err.count("\n") == 1


def test_help_mentions_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert "run" in out
    assert "backends" in out


FOUND = {
    "fast": Availability(ok=True, reason="found", version="1.2"),
    "slow": Availability(ok=False, reason="library absent " * 8, hint="pip install slow"),
}


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferro.backends.available", lambda: FOUND)


@pytest.mark.usefixtures("two_backends")
def test_backends_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [
        ["backend", "usable", "version"],
        ["fast", "yes", "1.2"],
        ["slow", "no", "-"],
    ]
    assert lines[2].index("library") == lines[3].index("library") == lines[0].index("why")
    assert lines[2].index("pip install slow") == lines[0].index("what to do")


@pytest.mark.usefixtures("two_backends")
def test_backends_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backends", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fast"] == {"ok": True, "reason": "found", "hint": "", "version": "1.2"}
    assert found["slow"]["hint"] == "pip install slow"


def test_run_help_names_the_options(tmp_path: Path) -> None:
    result = ferro("run", "--help")
    assert result.returncode == 0
    for option in ("--nproc-per-node", "--rdzv-endpoint", "--max-restarts", "--trace", "PET_"):
        assert option in result.stdout
