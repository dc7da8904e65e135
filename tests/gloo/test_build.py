"""A build leaves nothing in the source tree: the next one would ship modules that are gone since."""

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from ferro_gloo.shm.exchange.native_steps import NATIVE_STEPS
from ferro_gloo.shm.native import ABSENT, NATIVE

ROOT = Path(__file__).parents[2]
UV = shutil.which("uv") or ROOT / ".tools" / "bin" / "uv"


@pytest.mark.skipif(not Path(UV).exists(), reason="uv is not here")
def test_a_build_leaves_nothing_in_the_source_tree_and_ships_what_is_there_now(tmp_path):
    source, wheels = tmp_path / "gloo", tmp_path / "wheels"
    ignored = shutil.ignore_patterns("*.so", "*.egg-info", "build", "__pycache__")
    shutil.copytree(ROOT / "plugins" / "gloo", source, ignore=ignored)
    module = source / "src" / "ferro_gloo" / "gone.py"

    def files():
        return sorted(path.relative_to(source) for path in source.rglob("*"))

    def shipped():
        command = [UV, "build", "--quiet", "--wheel", source, "--out-dir", wheels]
        env = os.environ | {"CC": "false"}  # the native helper is optional, and takes seconds
        subprocess.run(command, check=True, timeout=300, env=env, cwd=tmp_path)
        [wheel] = wheels.glob("*.whl")
        return zipfile.ZipFile(wheel).namelist()

    module.write_text("")
    before = files()
    assert "ferro_gloo/gone.py" in shipped()
    assert files() == before
    module.unlink()
    found = shipped()
    assert "ferro_gloo/gone.py" not in found
    assert "ferro_gloo/py.typed" in found


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="there is no C compiler here")
def test_the_native_parts_are_built_where_a_compiler_is():
    """They are optional, so a mistake in them fails no installation."""
    assert NATIVE is not None, ABSENT
    assert NATIVE_STEPS is not None
