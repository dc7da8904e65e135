"""The command line of `ferro run`: options, defaults from Kubeflow, mistakes."""

from pathlib import Path

import pytest

from ferro.errors import UsageError
from ferro.launch import parse_options

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
        (["--grace-s", "-1", __file__], "--grace-s -1"),
        (["/"], "'/' is a directory without a file __main__.py"),
        (["-np", "two", __file__], "'two'"),
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
