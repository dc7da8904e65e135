"""The public names of core: listed in docs/public-names.md, and all that plugins may import."""

import ast
import importlib
import re

import pytest

from .source import CORE, ROOT, imports, modules, parse, relative

PUBLIC = {
    module: re.findall(r"`(\w+)`", names)
    for module, names in re.findall(
        r"^\| `(ferro[\w.]*)` \|.*\| (.*) \|$", (ROOT / "docs" / "public-names.md").read_text(), re.M
    )
}
assert "ferro" in PUBLIC, "docs/public-names.md is not as this test reads it"

# Everything that stands outside core and is not a test of it.
USERS = [path for module, path in modules().items() if not path.is_relative_to(CORE)] + [
    path for folder in ("benchmarks", "docs", "examples") for path in sorted((ROOT / folder).rglob("*.py"))
]


def violations(tree):
    """List the imports and attributes in a file that reach for names of core that are not public."""
    found = []
    handles = {}  # the local names of core's modules
    for item in imports(tree):
        if item.module.partition(".")[0] != "ferro":
            continue
        if not item.name:  # import ferro.x
            if item.module in PUBLIC:
                handles[item.alias] = item.module
            else:
                found.append(item.module)
        elif f"{item.module}.{item.name}" in PUBLIC:
            handles[item.alias] = f"{item.module}.{item.name}"
        elif item.name not in PUBLIC.get(item.module, ()):
            found.append(f"{item.module}.{item.name}")
    for node in ast.walk(tree):
        dotted = dotted_name(node)
        if dotted is None:
            continue
        handle = max((name for name in handles if dotted.startswith(f"{name}.")), key=len, default=None)
        if handle is not None:
            module, name = handles[handle], dotted[len(handle) + 1 :].partition(".")[0]
            if name not in PUBLIC[module] and f"{module}.{name}" not in PUBLIC:
                found.append(f"{module}.{name}")
    return sorted(set(found))


def dotted_name(node):
    """Write an attribute of a name out, such as "ferro.backends.get"; None for anything else."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if names and isinstance(node, ast.Name) else None


@pytest.mark.parametrize("path", USERS, ids=relative)
def test_only_public_names_of_core_are_imported(path):
    assert violations(parse(path)) == []


@pytest.mark.parametrize(
    "program",
    [
        "import ferro.forks",
        "import ferro.group.dispatcher",
        "from ferro import forks",
        "from ferro.group.dispatcher import Dispatcher",
        "from ferro.group import dispatcher",
        "from ferro.backends import _table",
        "from ferro.errors import *",
        "import ferro\nferro.group.dispatcher",
        "import ferro\nferro._hidden()",
        "from ferro import backends\nbackends._table()",
        "from ferro import backends as b\ndef f():\n    return b.installed()",
        "def f():\n    from ferro.runtime.world import World",
    ],
)
def test_an_inner_name_would_be_found(program):
    assert violations(ast.parse(program)) != []


@pytest.mark.parametrize(
    "program",
    ["import ferro\nferro.backends.available()\nferro.init", "from ferro.errors import UsageError", "import ferrox"],
)
def test_a_public_name_is_no_violation(program):
    assert violations(ast.parse(program)) == []


@pytest.mark.parametrize("module", PUBLIC)
def test_every_listed_name_is_there(module):
    names = PUBLIC[module]
    assert names == sorted(set(names))
    assert not any(name.startswith("_") for name in names)
    assert all(hasattr(importlib.import_module(module), name) for name in names)


@pytest.mark.parametrize("module", [module for module in PUBLIC if module.count(".") < 2])
def test_a_face_is_listed_whole(module):
    """What a package re-exports, and what a flat module defines without an underscore, is public."""
    tree = parse(modules()[module])
    said = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and is_all(node)]
    assert sorted(said[0] if said else defined(tree)) == PUBLIC[module]


def is_all(node):
    return getattr(node.targets[0], "id", "") == "__all__"


def defined(tree):
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def test_every_listed_name_of_an_inner_room_is_used_outside():
    """A name that no plugin needs is no contract: only the flat modules list more than that."""
    used = {
        f"{item.module}.{item.name}"
        for path in USERS
        for item in imports(parse(path))
        if item.module.startswith("ferro.")
    } | {f"{module}.{name}" for path in USERS for module, name in attributes_used(parse(path))}
    inner = {module for module in PUBLIC if module.count(".") > 1 and modules()[module].name != "__init__.py"}
    unused = [f"{module}.{name}" for module in inner for name in PUBLIC[module] if f"{module}.{name}" not in used]
    assert unused == []


def attributes_used(tree):
    handles = {
        item.alias: f"{item.module}.{item.name}" for item in imports(tree) if f"{item.module}.{item.name}" in PUBLIC
    }
    handles |= {item.alias: item.module for item in imports(tree) if not item.name and item.module in PUBLIC}
    for node in ast.walk(tree) if handles else ():
        dotted = dotted_name(node) if isinstance(node, ast.Attribute) else None
        for handle, module in handles.items() if dotted else ():
            if dotted.startswith(f"{handle}."):
                rest = dotted[len(handle) + 1 :]
                yield module, rest.partition(".")[0]
                inner, _, name = rest.rpartition(".")
                yield f"{module}.{inner}", name
