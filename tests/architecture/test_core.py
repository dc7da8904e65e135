"""Core stays small, light and ignorant: its size, its dependencies, what it reads and what it names."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter

import pytest

import ferro

from .source import CORE, ROOT, imports, modules, parse, relative

FILES = sorted(CORE.rglob("*.py"))
# What users and plugin authors read lies flat; everything else stands in a room.
FLAT = {"__init__", "__main__", "backend", "backends", "errors", "hookspecs", "observers", "strategies", "types"}
ROOMS = {"arrays", "cli", "collectives", "group", "launch", "plugins", "rendezvous", "runtime", "simulated"}
OUTSIDE = {"numpy", "pluggy", "importlib_metadata"}
HEAVY = ("asyncio", "cupy", "jax", "ml_dtypes", "mpi4py", "msgpack", "multiprocessing", "torch")
MOST_LINES, MOST_LAUNCHING_LINES, MOST_FILES, MOST_CONTRACT_LINES = 10_000, 3_000, 120, 200
LAUNCHING = (CORE / "launch", CORE / "runtime" / "environment")

PLUGINS = {folder.name for folder in (ROOT / "plugins").iterdir() if folder.is_dir()}
PEERS = {"torch", "jax", "horovod", "mpi4py", "open mpi", "mpich", "dask", "ray"}
# A hook and a module of core's own share their names with a distribution.
OWN = ("ferro_strategies", "ferro.strategies", "strategies", "strategy")


def strings(tree):
    """Yield every string that is no docstring."""
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def named_plugins(tree):
    """List the plugins and peers that a file names, as an identifier or in part of a string."""
    texts = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    texts += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    texts += [re.sub("|".join(OWN), "", text) for text in strings(tree)]
    words = "|".join(sorted(PLUGINS | PEERS))
    return sorted(
        {word.lower() for text in texts for word in re.findall(rf"(?<![a-zA-Z])(?:{words})(?![a-z])", text, re.I)}
    )


def test_core_is_small():
    def lines(files):  # blank ones apart
        return sum(bool(line.strip()) for path in files for line in path.read_text().splitlines())

    launching = [path for path in FILES if any(path.is_relative_to(room) for room in LAUNCHING)]
    assert len(FILES) <= MOST_FILES
    assert lines(set(FILES).difference(launching)) <= MOST_LINES
    assert lines(launching) <= MOST_LAUNCHING_LINES


def test_the_contract_of_a_backend_is_read_in_one_sitting():
    assert len((CORE / "backend.py").read_text().splitlines()) < MOST_CONTRACT_LINES


def test_nothing_lies_flat_but_what_users_and_authors_read():
    assert {path.stem for path in CORE.glob("*.py")} == FLAT
    assert {path.name for path in CORE.iterdir() if path.is_dir() and path.name != "__pycache__"} == ROOMS


def test_core_imports_the_standard_library_numpy_and_pluggy_only():
    allowed = {*sys.stdlib_module_names, *OUTSIDE, "ferro"}
    for path in FILES:
        tops = {found.module.partition(".")[0] for found in imports(parse(path), "ferro")}
        assert tops <= allowed, relative(path)


def test_core_names_no_plugin_and_no_peer():
    """Only the variables of foreign launchers, in the one room that reads them, bear such names."""
    for path in FILES:
        if not path.is_relative_to(CORE / "runtime" / "environment"):
            assert named_plugins(parse(path)) == [], relative(path)


@pytest.mark.parametrize(
    "program", ["x = 'use the gloo backend'", "x = 'FERRO_NCCL_PORT'", "ucc = 1", "a.mpi", "'mpi4py'"]
)
def test_a_name_would_be_found(program):
    assert named_plugins(ast.parse(f"y = 1\n{program}\nz = {program!r}"))


def test_core_unpickles_only_where_the_user_says_so():
    """Objects are the caller's choice; a cluster's ranks are children of this process, over a socket they inherit."""
    for path in FILES:
        if path not in (CORE / "group" / "objects.py", CORE / "launch" / "messages.py"):
            names = {found.module for found in imports(parse(path))}
            assert not {"pickle", "marshal", "shelve"} & names, relative(path)


def test_only_the_environment_room_reads_the_environment():
    readers = set()
    names = {"environ", "environb", "getenv", "putenv"}
    for path in modules().values():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute) and node.attr in names:
                readers.add(path.parent)
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                assert not names & {alias.name for alias in node.names}, path
    assert readers == {CORE / "runtime" / "environment"}


def test_a_class_name_is_defined_once_in_the_project():
    classes = Counter(
        node.name
        for path in modules().values()
        for node in parse(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in classes.items() if count > 1] == []


def test_no_docstring_begins_with_a_question_word():
    found = [
        f"{relative(path)}: {text.splitlines()[0]}"
        for path in modules().values()
        for text in docstrings(parse(path))
        if re.match(r"Return (what|where|who|how|whether)\b", text)
    ]
    assert found == []


def docstrings(tree):
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]


def test_every_file_says_what_it_is_for():
    for path in modules().values():
        assert ast.get_docstring(parse(path)), relative(path)


def test_everything_that_is_exported_is_there():
    assert list(ferro.__all__) == sorted(set(ferro.__all__))
    assert all(hasattr(ferro, name) for name in ferro.__all__)


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import ferro", (*HEAVY, "logging", "pathlib", "selectors", "socket")),
        ("import ferro; ferro.backends.available()", HEAVY),
    ],
    ids=["import ferro", "available"],
)
def test_importing_ferro_and_asking_what_is_there_load_nothing_heavy(statement, heavy):
    script = (
        "import json, sys\n"
        "def audit(event, args):\n"
        "    if event.startswith('socket.') and event != 'socket.gethostname':\n"
        "        raise AssertionError(event)\n"
        "sys.addaudithook(audit)\n"
        f"{statement}\n"
        f"print(json.dumps([name for name in {heavy!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_the_testing_kit_needs_no_pytest():
    for module, path in modules().items():
        if module.startswith("ferro_testing.") and path.name != "pytest_ranks.py":
            assert "pytest" not in {found.module for found in imports(parse(path))}, relative(path)
