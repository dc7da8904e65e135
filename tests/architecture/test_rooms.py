"""The house, held: no circles, imports that run one way, one skeleton for every distribution."""

import ast
import re
import tomllib

import pytest

from .source import CORE, ROOT, SOURCES, circles, graph, imports_of, modules, parse, relative

PACKAGES = sorted({module.partition(".")[0] for module in modules()} - {"ferro"})
DRAWING = re.compile(r"^ {4}(\S[^ ]*(?: [^ ]+)*?)(?: {2,}|$)", re.M)


def drawn_floors():
    """Read the picture of CONTRIBUTING.md: for each package, its floors from the top to the bottom.

    A floor is a line; it names one or several rooms (`launch/`) or files (`backends.py`), which do
    not import each other.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text()
    picture = re.search(r"```text\n(ferro/.*?)```", text, re.S).group(1)
    floors, package = {}, None
    for line in picture.splitlines():
        if line and not line.startswith(" "):
            package = line.split("/")[0]
            floors[package] = []
        elif match := DRAWING.match(line):
            floors[package].append(match.group(1).split())
    return floors


def place_of(module, floors):
    """Find the floor that a module is on, and its room there, by the longest name that fits."""
    package = module.partition(".")[0]
    path = modules()[module]
    source = next(source for source in SOURCES if path.is_relative_to(source))
    inside = str(path.relative_to(source / package))
    fits = [
        (len(name), number, name)
        for number, names in enumerate(floors[package])
        for name in names
        if inside == name or (name.endswith("/") and inside.startswith(name))
    ]
    assert fits, f"{relative(path)} is on no floor of the picture in CONTRIBUTING.md"
    return max(fits)[1:]


def test_there_are_no_circles():
    assert circles(graph()) == []


def test_a_circle_would_be_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]


def test_imports_run_downwards_as_drawn():
    floors = drawn_floors()
    assert {"ferro", "ferro_gloo", "ferro_strategies"} <= set(floors)
    wrong = []
    for module, targets in graph().items():
        package = module.partition(".")[0]
        for target in targets:
            if package in floors and target.partition(".")[0] == package:
                (floor, room), (below, other) = place_of(module, floors), place_of(target, floors)
                if floor > below or (floor == below and room != other):
                    wrong.append(f"{module} -> {target}")
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_plugin_imports_no_other_plugin(package):
    own = package.removesuffix("_plugin").removesuffix("_pytest")
    for module in modules():
        if module.partition(".")[0] == package:
            tops = {found.module.partition(".")[0] for found in imports_of(module)}
            others = {top for top in tops if top.startswith("ferro_")}
            assert all(top.startswith(own) for top in others), module


def test_a_strategy_sees_groups_and_never_a_backend():
    hidden = {"ferro.backend", "ferro.group", "ferro.rendezvous", "ferro.simulated"}
    for module in modules():
        if module.startswith("ferro_strategies"):
            for found in imports_of(module):
                rooms = {".".join(found.module.split(".")[:2]), f"{found.module}.{found.name}"}
                assert not hidden & rooms, f"{module}: {found}"


def test_packages_only_re_export():
    for module, path in modules().items():
        if path.name == "__init__.py":
            for node in parse(path).body:
                allowed = ast.Expr | ast.Import | ast.ImportFrom | ast.Assign
                assert isinstance(node, allowed), f"{relative(path)}:{node.lineno}"
                if isinstance(node, ast.Assign):
                    assert node.targets[0].id == "__all__", module


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_every_distribution_has_the_one_skeleton(source):
    folder = source.parent
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    name = "ferro" if source == CORE.parent else f"ferro-{folder.name}"
    assert project["name"] == name
    assert (folder / "README.md").read_text().startswith(f"# {name}")
    package = source / name.replace("-", "_")
    assert (package / "py.typed").exists()
    packages = {path.name for path in source.iterdir() if (path / "__init__.py").exists()}
    assert packages == {package.name}, "an import package for each distribution, and one only"


def test_the_workspace_brings_every_distribution_and_core_an_extra_for_each():
    names = {f"ferro-{source.parent.name}" for source in SOURCES[1:]}
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert names <= set(workspace["project"]["dependencies"])
    extras = tomllib.loads((ROOT / "core" / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {requirement.split("==")[0] for requirement in extras["all"]} == names
    for name in names:
        assert any(requirement.startswith(name) for requirement in extras[name.removeprefix("ferro-")])
