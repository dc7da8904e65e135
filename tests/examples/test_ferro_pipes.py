"""The example of a third-party backend: small, and a distribution of its own that works."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sysconfig
import tokenize
import venv
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ferro-pipes"
PAGE = ROOT / "docs" / "writing-a-backend.md"
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
PROGRAM = """
import ferro
import numpy as np

with ferro.init("pipes") as group:
    total = group.all_reduce(np.arange(100_000.0))
    halves = group.split(group.rank % 2)
    print(f"rank {group.rank}: {total[3]} {int(halves.all_reduce(1))}")
"""


def code_lines(path):
    """Return how many lines hold code: no blank ones, no comments, no docstrings."""
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [token for token in tokens if token.type not in {*LAYOUT, tokenize.ENDMARKER}]
    lines = {n for token in found for n in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        holds = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if holds and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_plugin_and_backend_are_under_80_lines():
    sources = sorted((EXAMPLE / "src").rglob("*.py"))
    assert {path.name for path in sources} == {"__init__.py", "plugin.py", "backend.py"}
    assert sum(map(code_lines, sources)) < 80


@pytest.mark.parametrize("file", ["src/ferro_pipes/backend.py", "src/ferro_pipes/plugin.py", "pyproject.toml"])
def test_the_page_shows_the_whole_file(file):
    text = (EXAMPLE / file).read_text().strip()
    blocks = re.findall(r"```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert any(text in block for block in blocks), f"{PAGE.name} has no block that is {file}"


def test_the_page_shows_the_conformance_test():
    text = (EXAMPLE / "tests" / "test_conformance.py").read_text()
    assert text[text.index("import pytest") :].strip() in PAGE.read_text()


def installer(environment):
    """Make an environment; return the command that installs into it: uv where it is, since pip takes a minute."""
    uv = shutil.which("uv", path=f"{os.environ['PATH']}{os.pathsep}{ROOT / '.tools' / 'bin'}")
    venv.create(environment, with_pip=uv is None)
    python = environment / "bin" / "python"
    if uv is None:
        return [python, "-m", "pip", "--disable-pip-version-check", "install"]
    return [uv, "pip", "install", "--python", python]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A new virtual environment with ferro-pipes in it, built from a copy of its sources.

    ferro itself, NumPy and pytest are those of this environment.
    """
    folder = tmp_path_factory.mktemp("pipes")
    source = folder / "ferro-pipes"
    subprocess.run(["cp", "-r", EXAMPLE, source], check=True)
    subprocess.run([*installer(folder / "env"), "--quiet", "--no-deps", source], check=True, timeout=300)
    [packages] = (folder / "env").glob("lib/python*/site-packages")
    here = sysconfig.get_path("purelib")
    (packages / "tests_environment.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    return folder


def call(installed, *arguments):
    """Run Python in the new environment; return what it prints."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FERRO"))}
    ended = subprocess.run(
        [installed / "env" / "bin" / "python", *arguments],
        cwd=installed,
        env={**inherited, "TMPDIR": str(_empty(installed))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def _empty(installed):
    """Return the folder in which the ranks make their files."""
    folder = installed / "tmp"
    folder.mkdir(exist_ok=True)
    return folder


def test_it_is_a_distribution_that_ferro_finds(installed):
    assert list((installed / "env").glob("lib/python*/site-packages/ferro_pipes/py.typed"))
    assert re.search(r"^pipes +yes", call(installed, "-m", "ferro", "backends"), re.MULTILINE)


def test_a_program_runs_over_it(installed):
    (installed / "program.py").write_text(PROGRAM)
    text = call(installed, "-m", "ferro", "run", "-n", "4", "program.py")
    for rank in range(4):
        assert f"rank {rank}: 12.0 2" in text
    assert not list(_empty(installed).iterdir())


def test_the_other_programs_of_the_page_run(installed):
    blocks = re.findall(r"```python\n(# (\w+\.py)\n.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for _, name in blocks] == ["first.py", "test_sum.py"]
    for block, name in blocks:
        (installed / name).write_text(block)
    text = call(installed, "-m", "ferro", "run", "-n", "3", "first.py")
    assert all(f"{rank} 3" in text for rank in range(3))
    registered = {entry.value for entry in entry_points(group="pytest11")}
    plugin = [] if "ferro_testing_pytest" in registered else ["-p", "ferro_testing_pytest"]
    options = ["-q", "-p", "no:cacheprovider", *plugin, "--ferro-backend=pipes"]
    assert "3 passed" in call(installed, "-m", "pytest", *options, "test_sum.py")


def test_its_own_tests_pass(installed):
    source = installed / "ferro-pipes" / "tests"
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    text = call(installed, "-m", "pytest", *options, source)
    assert " passed" in text
    assert "skipped" not in text
    assert not list(_empty(installed).glob("*/door"))  # nor did the ranks that were killed
