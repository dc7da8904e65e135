"""Build the site: stage the repository's pages and a reference from the docstrings, and run MkDocs strictly.

python docs/build_site.py [FOLDER]      into site/, or FOLDER; dead links and pages outside nav are errors
"""

from __future__ import annotations

import importlib
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]
# Modules beyond core's public ones (docs/public-names.md), by the names that they export.
OTHERS = (
    *("ferro_strategies", "ferro_strategies.nn", "ferro_strategies.optim", "ferro_strategies.pipeline"),
    *("ferro_testing", "ferro_testing.conformance", "ferro_testing.schedules", "ferro_testing.strategies"),
)
SOURCES = ("core/src", "plugins/strategies/src", "plugins/testing/src")
LINK = re.compile(r"(\[[^\]]*\]\()(?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def pages() -> list[Path]:
    """List the pages of the repository, relative to its root."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/README.md")]
    found += [*ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/README.md"), *ROOT.glob("examples/*/README.md")]
    return sorted(path.relative_to(ROOT) for path in found)


def stage(folder: Path) -> None:
    """Copy all pages, and the files that they link to; source files become text, folders their README or nothing."""
    for page in pages():
        target = folder / page
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / page).read_text("utf-8")
        target.write_text(LINK.sub(lambda link, page=page: _staged(link, page, folder), text), "utf-8")
    shutil.copy(ROOT / "docs" / "site.css", folder / "docs")


def _staged(link: re.Match[str], page: Path, folder: Path) -> str:
    """Return a link as it is in the site; copy its file."""
    begin, target, anchor = link[1], link[2], link[3] or ""
    source = (ROOT / page.parent / target).resolve()
    if source.is_dir():
        if (source / "README.md").exists():
            return f"{begin}{target.rstrip('/')}/README.md{anchor})"
        return begin[1:-2]  # a folder of sources: its name is enough
    if source.suffix != ".md" and source.is_file():
        # A .py file would be downloaded; as text it is read.
        suffix = ".txt" if source.suffix in (".py", ".c", ".toml") else ""
        copy = folder / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy.with_name(copy.name + suffix))
        return f"{begin}{target}{suffix}{anchor})"
    return link[0]


def reference(folder: Path) -> list[dict[str, str]]:
    """Write a page for each public module; return their entries for nav.

    A name is described where it is met first, on the page of `ferro` if it is there; other pages link to it.
    """
    listed = re.findall(
        r"^\| `(ferro[\w.]*)` \|.*\| (.*) \|$", (ROOT / "docs/public-names.md").read_text("utf-8"), re.M
    )
    modules = {module: re.findall(r"`(\w+)`", names) for module, names in listed}
    modules |= {module: list(importlib.import_module(module).__all__) for module in OTHERS if _exports(module)}
    described: dict[object, str] = {}
    entries = []
    (folder / "reference").mkdir(exist_ok=True)
    for module, names in modules.items():
        path = f"reference/{module}.md"
        (folder / path).write_text("\n\n".join(_module_page(module, names, modules, described)) + "\n", "utf-8")
        entries.append({module: path})
    return entries


def _exports(module: str) -> bool:
    return hasattr(importlib.import_module(module), "__all__")


def _module_page(
    module: str, names: Iterable[str], modules: dict[str, list[str]], described: dict[object, str]
) -> Iterator[str]:
    loaded = importlib.import_module(module)
    yield f"# {module}"
    yield (loaded.__doc__ or "").partition("\n")[0]
    for name in names:
        item: Any = getattr(loaded, name)
        full = f"{module}.{name}"
        if full in modules:
            yield f"- [`{full}`]({full}.md)"
            continue
        try:
            first = described.setdefault(item, full)
        except TypeError:  # what cannot be hashed is a constant of this module
            first = full
        home = f"{item.__module__}.{item.__qualname__}" if hasattr(item, "__qualname__") else full
        if first == full and home.startswith("ferro"):
            yield f"::: {home}\n    options:\n      heading: {full}"
        elif first != full:
            yield f"- `{name}`: see [`{first}`]({first.rpartition('.')[0]}.md)"
        else:
            yield f"- `{name}`"


def present(nav: list[Any], folder: Path, entries: list[dict[str, str]]) -> list[Any]:
    """Return nav with the reference in it, and without pages that are not there."""
    kept: list[Any] = []
    for entry in nav:
        [(title, target)] = entry.items()
        if title == "Reference":
            kept.append({title: entries})
        elif isinstance(target, list):
            kept.append({title: present(target, folder, entries)})
        elif (folder / target).exists():
            kept.append(entry)
    return kept


def main() -> int:
    """Build into the folder that is named, or site/."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site").absolute()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with tempfile.TemporaryDirectory(prefix="ferro-site-") as name:
        folder = Path(name)
        stage(folder)
        entries = reference(folder)
        config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(folder), site_dir=str(target), strict=True)
        config.nav = present(config.nav or [], folder, entries)
        config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(ROOT / it) for it in SOURCES]
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
        config.plugins.on_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
