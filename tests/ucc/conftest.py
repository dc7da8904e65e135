"""What tests of the ucc backend share."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ferro_ucc.library import UnusableLibrary, find_library


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs libucc where there is none, with the probe's own words."""
    needing = [item for item in items if item.get_closest_marker("ucc")]
    if needing and isinstance(found := find_library(), UnusableLibrary):
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=found.reason))


@pytest.fixture
def compile_library(tmp_path: Path) -> Callable[[str, str], Path]:
    """Compile C source into a shared library of a given name; skip where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")

    def build(name: str, source: str) -> Path:
        (tmp_path / f"{name}.c").write_text(source)
        made = tmp_path / f"{name}.so"
        command = [compiler, "-shared", "-fPIC", "-o", str(made), str(tmp_path / f"{name}.c")]
        subprocess.run(command, check=True, timeout=30)
        return made

    return build
