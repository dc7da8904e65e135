"""The architecture, held: who imports whom, who reads the environment, and what imports cost."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ferro

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "src" / "ferro"
PLUGINS = sorted((ROOT / "plugins").glob("*/src/*"))
CORE_FILES = sorted(CORE.rglob("*.py"))

# What core may import, and what only where it is needed: bfloat16 lives in ml_dtypes.
OUTSIDE = {"numpy", "pluggy", "importlib_metadata"}
PLUGIN_NAMES = {"bench", "gloo", "hybrid", "mpi", "nccl", "ucc", "checkpoint", "rpc"}
PLUGIN_PACKAGES = {f"ferro_{name}" for name in (*PLUGIN_NAMES, "strategies", "testing")}
HEAVY = ("asyncio", "cupy", "jax", "ml_dtypes", "mpi4py", "msgpack", "multiprocessing", "torch")

assert CORE_FILES, "the tests are not beside the sources"


def parse(path):
    return ast.parse(path.read_text(), str(path))


def imports(tree):
    """Yield every module that is imported, at the top of a file or within a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:  # others stay in the package
            yield node.module


def strings(tree):
    """Yield every string that is no docstring."""
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def relative(path):
    return str(path.relative_to(ROOT))


def test_core_imports_the_standard_library_numpy_and_pluggy_only():
    allowed = {*sys.stdlib_module_names, *OUTSIDE, "ferro"}
    for path in CORE_FILES:
        tops = {name.partition(".")[0] for name in imports(parse(path))}
        assert tops <= allowed, relative(path)


def test_core_names_no_plugin():
    """As an identifier or as a whole string; `ferro_strategies` is a hook's name, too."""
    named = (PLUGIN_NAMES | PLUGIN_PACKAGES) - {"ferro_strategies"}
    for path in CORE_FILES:
        tree = parse(path)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not (names | set(strings(tree))) & named, relative(path)


def test_core_unpickles_only_where_the_user_says_so():
    for path in CORE_FILES:
        if path != CORE / "group" / "objects.py":
            assert not {"pickle", "marshal", "shelve"} & set(imports(parse(path))), relative(path)


def test_only_the_environment_room_reads_the_environment():
    readers = set()
    for path in [*CORE_FILES, *(path for package in PLUGINS for path in package.rglob("*.py"))]:
        for node in ast.walk(parse(path)):
            names = {"environ", "environb", "getenv", "putenv"}
            if isinstance(node, ast.Attribute) and node.attr in names:
                readers.add(path.parent)
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                assert not names & {alias.name for alias in node.names}, path
    assert readers == {CORE / "runtime" / "environment"}


@pytest.mark.parametrize("package", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_imports_public_names_of_ferro_only(package):
    for path in package.rglob("*.py"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ferro":
                where = f"{relative(path)}: from {node.module}"
                assert not any(part.startswith("_") for part in node.module.split(".")), where
                for alias in node.names:
                    assert not alias.name.startswith("_"), f"{where} import {alias.name}"
                    assert alias.name != "*", where


@pytest.mark.parametrize("package", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_imports_no_other_plugin(package):
    for path in package.rglob("*.py"):
        others = {name.partition(".")[0] for name in imports(parse(path))}
        assert not others & (PLUGIN_PACKAGES - {package.name}), relative(path)


def test_a_strategy_sees_groups_and_never_a_backend():
    (package,) = [path for path in PLUGINS if path.name == "ferro_strategies"]
    for path in package.rglob("*.py"):
        rooms = {tuple(name.split(".")[:2]) for name in imports(parse(path))}
        hidden = {("ferro", room) for room in ("backend", "group", "rendezvous", "simulated")}
        assert not hidden & rooms, relative(path)


def test_packages_only_re_export():
    for path in CORE.rglob("__init__.py"):
        for node in parse(path).body:
            allowed = ast.Expr | ast.Import | ast.ImportFrom | ast.Assign
            assert isinstance(node, allowed), f"{relative(path)}:{node.lineno}"
            if isinstance(node, ast.Assign):
                assert node.targets[0].id == "__all__", relative(path)


def test_everything_that_is_exported_is_there():
    assert list(ferro.__all__) == sorted(set(ferro.__all__))
    assert all(hasattr(ferro, name) for name in ferro.__all__)


@pytest.mark.parametrize("statement", ["import ferro", "import ferro; ferro.backends.available()"], ids=str)
def test_importing_ferro_and_asking_what_is_there_load_nothing_heavy(statement):
    script = (
        "import json, sys\n"
        "def audit(event, args):\n"
        "    if event.startswith('socket.') and event != 'socket.gethostname':\n"
        "        raise AssertionError(event)\n"
        "sys.addaudithook(audit)\n"
        f"{statement}\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_the_testing_kit_needs_no_pytest():
    for path in (ROOT / "plugins" / "testing" / "src" / "ferro_testing").rglob("*.py"):
        if path.name != "pytest_ranks.py":
            assert "pytest" not in set(imports(parse(path))), relative(path)
