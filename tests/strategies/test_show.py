"""`ferro show`: a strategy draws what it would do."""

import pytest

from ferro import strategies
from ferro.cli.main import main
from ferro.errors import PluginError


def test_a_pipeline_shows_its_schedule(capsys, tmp_path):
    drawing = tmp_path / "1f1b.svg"
    arguments = ["pipeline", "1f1b", "--stages=4", "--microbatches=8", f"--svg={drawing}"]
    assert main(["show", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "rank 0  F0 F1 F2 F3" in shown
    assert "bubble   27.3%" in shown
    assert drawing.read_text().lstrip().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what is to be shown? There is: pipeline"),
        (["--svg"], "There is: pipeline"),
        (["ddp"], "ddp draws nothing"),
        (["pipeline", "zigzag", "--stages=2", "--microbatches=2"], "zigzag"),
        (["pipeline", "1f1b", "--stages=2"], "--microbatches"),
    ],
)
def test_mistakes_are_one_line_that_says_what_there_is(capsys, arguments, message):
    assert main(["show", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_says_what_there_is(capsys, option):
    assert main(["show", option]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("usage: ferro show NAME")
    assert "There is: pipeline." in told.out
    assert not told.err


def test_what_is_not_installed_is_named(capsys):
    assert main(["show", "magic"]) == 2
    assert "'magic'" in capsys.readouterr().err
    with pytest.raises(PluginError):
        strategies.info("magic")


def test_all_strategies_load():
    assert set(strategies.available()) == {
        *("ddp", "fsdp", "pipeline", "sync_batchnorm", "tensor_parallel", "context_parallel", "expert_parallel")
    }
    for name in strategies.available():
        assert callable(strategies.get(name))
