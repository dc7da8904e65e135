"""The page on notebooks is a notebook: its blocks are run as cells, and print what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "notebooks.md").read_text()
CELLS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", PAGE, re.DOTALL)


def lines(outputs):
    """Return the lines of a cell's outputs, without colors."""
    texts = []
    for output in outputs:
        if output.output_type == "stream":
            texts.append(output.text)
        elif output.output_type == "error":
            texts += output.traceback
        else:
            texts.append(output.data["text/plain"])
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(texts)).splitlines()


# ipykernel's own warnings on its dependencies are not ours.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_page_runs_as_a_notebook(tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code, _ in CELLS])
    client = nbclient.NotebookClient(
        book, timeout=100, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}, kernel_name="python3"
    )
    client.execute()
    for cell, (code, shown) in zip(book.cells, CELLS, strict=True):
        printed = lines(cell.outputs)
        for line in shown.splitlines():
            assert any(line in there for there in printed), (code, shown, printed)
        if "Error" not in shown:
            assert not any(output.output_type == "error" for output in cell.outputs), (code, printed)
    assert sum(bool(shown) for _, shown in CELLS) >= 6
