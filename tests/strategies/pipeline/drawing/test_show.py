"""The command `ferro show pipeline`."""

import xml.etree.ElementTree as ET

import pytest

from ferro import UsageError
from ferro_strategies.pipeline.drawing.show import show

SVG = "{http://www.w3.org/2000/svg}"


def test_the_command_draws_and_tells(capsys, tmp_path):
    path = tmp_path / "timeline.svg"
    arguments = ["1f1b", "--stages", "4", "--microbatches", "8", "--svg", str(path)]
    assert show(arguments) == 0
    out = capsys.readouterr().out
    assert "rank 3  .........F0 B0=== F1 B1===" in out
    assert "bubble   27.3%\nformula  27.3% = (p-1) / (m v + p-1)" in out
    assert "   3  27.3%                  1          1" in out
    assert ET.fromstring(path.read_text(encoding="utf-8")).tag == f"{SVG}svg"


def test_the_command_takes_ranks_and_durations(capsys):
    def told(arguments):
        assert show(arguments.split()) == 0
        return capsys.readouterr().out

    out = told("interleaved_1f1b --stages 4 --ranks 2 --microbatches 4 --forward 2 --transfer 0.5")
    assert "4 stages on 2 ranks, 4 microbatches" in out
    assert "formula  11.1%" in out
    out = told("zb_h1 --stages 3 --microbatches 2")
    assert "formula  no formula is known for these numbers" in out
    out = told("zb_h1 --stages 4 --microbatches 8 --backward 3 --weight 1")
    assert "B0=== W0 " in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "arguments are required"),
        ("1f1b --stages 4", "--microbatches"),
        ("2f2b --stages 4 --microbatches 8", "invalid choice"),
        ("1f1b --stages 4 --ranks 3 --microbatches 8", "must be a multiple of the number of ranks"),
        ("1f1b --stages 0 --microbatches 8", "--stages 0: must be 1 or more"),
        ("1f1b --stages 4 --ranks 0 --microbatches 8", "--ranks 0: must be 1 or more"),
        ("1f1b --stages 4 --microbatches 8 --columns 39", "--columns 39: must be 40 or more"),
        ("1f1b --stages 4 --microbatches 0", "microbatches must be 1 or more"),
        ("1f1b --stages 4 --microbatches 8 --forward -1", "forward must be 0 or more"),
        ("1f1b --stages 2 --microbatches 2 --svg /nonexistent/a.svg", "cannot be written"),
    ],
)
def test_the_command_refuses_nonsense(arguments, said):
    with pytest.raises(UsageError) as caught:
        show(arguments.split())
    assert said in str(caught.value)
