"""The site: every page and every public name of it is there, and no link leads nowhere (the build is strict)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ferro
from ferro_testing.strategies import CHECKS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, ROOT / "docs" / "build_site.py", folder]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "WARNING" not in ended.stderr
    return folder


def test_every_page_of_the_repository_is_in_the_site(site):
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/README.md")]
    assert len(pages) > 20
    for page in pages:
        path = page.relative_to(ROOT)
        folder = path.parent if page.name == "README.md" else path.with_suffix("")
        assert (site / folder / "index.html").exists(), path


def test_every_public_name_is_described_from_its_docstring(site):
    page = (site / "reference" / "ferro" / "index.html").read_text()
    described = set(re.findall(r'<h2 id="(ferro[\w.]*)"', page))
    missing = {name for name in ferro.__all__ if not any(it.endswith(f".{name}") for it in described)}
    modules = {name for name in missing if isinstance(getattr(ferro, name), type(ferro))}
    assert missing - modules - {"hookimpl"} == set()
    assert "Reduce" in page
    kit = (site / "reference" / "ferro_testing.strategies" / "index.html").read_text()
    assert all(check.__name__ in kit for check in CHECKS)
