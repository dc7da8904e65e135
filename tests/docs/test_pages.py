"""What the pages say is so: their programs run, and their generated parts are up to date."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

import ferro
from ferro_testing import run_ranks, run_ranks_outcomes
from ferro_testing.schedules import check

ROOT = Path(__file__).parents[2]
FERRO = Path(sys.executable).parent / "ferro"


def code(page, first_words):
    """Return the Python block of a page that holds these words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    [block] = [block for block in blocks if first_words in block]
    return block


PROGRAMS = [("README.md", "train.py"), ("docs/gloo.md", "average.py"), ("docs/resuming.md", "resume.py")]


@pytest.mark.parametrize(
    ("launch", "page", "name"),
    [((FERRO, "run", "-n", "3"), *PROGRAMS[0]), *(((sys.executable,), *program) for program in PROGRAMS)],
)
def test_the_programs_of_the_pages_run(tmp_path, launch, page, name):
    program = tmp_path / name
    program.write_text(code(page, f"# {name}"))
    ended = subprocess.run([*launch, program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()


@pytest.mark.parametrize(("page", "name"), PROGRAMS[1:])
def test_the_programs_of_the_pages_run_on_several_ranks(tmp_path, monkeypatch, page, name):
    (tmp_path / name).write_text(code(page, f"# {name}"))
    monkeypatch.chdir(tmp_path)
    outcomes = run_ranks_outcomes(run_program, 3, backend="gloo", args=[name])
    assert all(outcome.ok for outcome in outcomes), [outcome.describe() for outcome in outcomes]
    assert any(outcome.output.strip() for outcome in outcomes)


def run_program(group, path):
    """Run a program that joins the job itself, on a rank that is forked and need not import everything again."""
    group.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(path, run_name="__main__")
    ferro.shutdown()


@pytest.mark.parametrize(
    ("page", "ranks"),
    [
        ("docs/fsdp.md", 4),
        ("docs/optimizers.md", 2),
        ("docs/layers.md", 1),
        ("docs/pipeline.md", 4),
        ("docs/tensor-parallel.md", 4),
        ("docs/mesh.md", 8),
        ("docs/modules.md", 1),
        ("docs/context-parallel.md", 4),
        ("docs/expert-parallel.md", 4),
        ("docs/sync-batchnorm.md", 2),
        ("docs/data.md", 2),
        ("docs/training-loop.md", 2),
        ("plugins/strategies/README.md", 3),
    ],
)
def test_all_blocks_of_a_page_are_one_program(tmp_path, page, ranks):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks))
    run_ranks(run_program, ranks, backend="gloo", args=[str(program)])


def test_the_page_of_meshes_shows_the_picture_that_its_program_prints():
    page = (ROOT / "docs" / "mesh.md").read_text()
    [shown] = re.findall(r"```text\n(.*?)\n```", page, re.DOTALL)
    lines = code("docs/mesh.md", "# mesh.py").replace("group = ferro.init()", "")

    def on_rank(group):
        scope = {"group": group, "print": lambda _: None}
        exec(lines, scope)
        return scope["mesh"].picture()

    assert ferro.simulate(on_rank, 8)[2] == shown


def test_the_readmes_collectives_run():
    lines = code("README.md", "group = ferro.init()")
    lines = lines.replace("group = ferro.init()", "").replace("; group.recv", "\n#")

    def on_rank(group):
        import numpy as np

        x = np.ones((5, 2), np.float32)
        buffer = np.empty_like(x)
        program = lines.replace("group.send(", "group.rank or group.send(")
        around = {"up": (group.rank - 1) % group.world_size, "down": (group.rank + 1) % group.world_size}
        rows = {"row": x[0], "last": x[4], "halo": np.empty_like(x[0]), "other": np.empty_like(x[0])}
        scope = {"group": group, "x": x, "mine": x[group.rank :], "buffer": buffer, "ferro": ferro}
        exec(program, scope | around | rows)
        if group.rank == 1:
            group.recv(buffer, src=0, tag=7)
        return x.tolist()

    assert ferro.simulate(on_rank, 3) == [[[1.0, 1.0]] * 5] * 3


def test_the_algorithm_of_the_collectives_page_is_one():
    scope = {}
    exec(code("docs/collectives.md", "def fan("), scope)
    for ranks in range(1, 9):
        check("all_reduce", scope["fan"], ranks)
    [info] = scope["ferro_collectives"]()
    assert info.algorithm == "fan"
    assert info.algorithm not in ferro.collectives.available()["all_reduce"]  # it can be installed as it stands


def test_the_programs_of_the_testing_page_run():
    page = (ROOT / "docs" / "testing.md").read_text()
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, scope)


def test_generated_parts_are_up_to_date():
    page = ROOT / "docs" / "generate.py"
    assert subprocess.run([sys.executable, page, "--check"], timeout=60).returncode == 0


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "plugins" / "strategies" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_strategy_of_the_page_passes_the_kit(monkeypatch):
    page = (ROOT / "docs" / "writing-a-strategy.md").read_text()
    module = types.ModuleType("my_strategy.averaged")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, module.__dict__)
    for check_strategy in module.CHECKS:
        check_strategy(module.CASE)
    monkeypatch.setitem(sys.modules, "my_strategy", types.ModuleType("my_strategy"))
    monkeypatch.setitem(sys.modules, "my_strategy.averaged", module)
    [info] = module.ferro_strategies()
    assert info.load() is module.Averaged


def test_every_block_of_python_is_python():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/README.md")]
    blocks = [
        (page, block) for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    assert len(blocks) > 50
    for page, block in blocks:
        compile(block, page, "exec")
