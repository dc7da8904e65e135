"""The sources of all distributions as data: modules, and who imports which names from where."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "src" / "ferro"
SOURCES = (ROOT / "core" / "src", *sorted((ROOT / "plugins").glob("*/src")))


@dataclass(frozen=True)
class Import:
    """One imported name: `name` of `module`, or the module itself where `name` is ""."""

    module: str
    name: str = ""
    alias: str = ""


@lru_cache(maxsize=1)
def modules() -> dict[str, Path]:
    """Map every module of every distribution to its file."""
    found = {}
    for source in SOURCES:
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    assert "ferro" in found, "the tests are not beside the sources"
    return found


@cache
def parse(path: Path) -> ast.Module:
    """Parse a file, once."""
    return ast.parse(path.read_text(), str(path))


@cache
def imports(tree: ast.Module, package: str = "") -> tuple[Import, ...]:
    """List every import, at the top of a file or within a function, for type checkers only or not.

    Args:
        tree: the file's.
        package: the package that the file is in, for relative imports.
    """
    found: list[Import] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += (Import(alias.name, alias=alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, *([node.module] if node.module else [])])
            found += (Import(module, alias.name, alias.asname or alias.name) for alias in node.names)
    return tuple(found)


def imports_of(module: str) -> list[Import]:
    """List the imports of a module of ours."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return list(imports(parse(path), package))


@lru_cache(maxsize=1)
def graph() -> dict[str, set[str]]:
    """Map every module of ours to the modules of ours that it imports."""
    known = modules()
    edges: dict[str, set[str]] = {}
    for module in known:
        targets = set()
        for found in imports_of(module):
            whole = f"{found.module}.{found.name}"
            targets.add(whole if whole in known else found.module)
        edges[module] = {target for target in targets if target in known} - {module}
    return edges


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Find the strongly connected components of more than one node (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(component)

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def relative(path: Path) -> str:
    """Name a file as a person would."""
    return str(path.relative_to(ROOT))
