"""`ferro backends` and `ferro plugins`: what is installed, as a table or as JSON."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from ferro.backends import available
from ferro.cli.parser import Parser
from ferro.plugins.registry import installed

_CELL_CHARACTERS = 44


def show_backends(arguments: Sequence[str]) -> int:
    """Print the installed backends, and whether each can be used here; return the exit status."""
    if _wants_json("backends", "Show which backends are installed, and whether they can be used.", arguments):
        print(json.dumps({name: asdict(it) for name, it in available().items()}, indent=2))  # noqa: T201 - a command talks
    else:
        rows = [("backend", "usable", "version", "why", "what to do")]
        for name, it in available().items():
            rows.append((name, "yes" if it.ok else "no", it.version or "-", it.reason or "-", it.hint or "-"))
        print(_table(rows))  # noqa: T201 - a command talks
    return 0


def show_plugins(arguments: Sequence[str]) -> int:
    """Print every installed plugin with its hooks and versions; return 1 when one is broken."""
    as_json = _wants_json("plugins", "Show every installed plugin: distribution, hooks, versions, time.", arguments)
    plugins = installed()
    failing = plugins.failing()
    if as_json:
        loaded = {name: asdict(it) for name, it in plugins.loaded.items()}
        broken = {it.name: str(it.error) for it in failing}
        print(json.dumps({"loaded": loaded, "broken": broken}, indent=2))  # noqa: T201 - a command talks
    else:
        rows = [("plugin", "distribution", "hooks", "contract", "import")]
        for name, it in plugins.loaded.items():
            stated = it.api_version if isinstance(it.api_version, tuple) else (it.api_version or "-",)
            contract = ".".join(map(str, stated))
            rows.append((name, it.distribution, ", ".join(it.hooks) or "-", contract, f"{1e3 * it.import_s:.1f} ms"))
        silent = [f"{name}: {it.distribution}: {it.silence}" for name, it in plugins.loaded.items() if it.silence]
        print("\n".join([_table(rows), *silent, *(f"{it.name}: {it.error}" for it in failing)]))  # noqa: T201
    return 1 if failing else 0


def _wants_json(name: str, description: str, arguments: Sequence[str]) -> bool:
    parser = Parser(prog=f"ferro {name}", description=description)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return bool(parser.parse_args(arguments).json)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows as aligned columns; long texts go on below."""
    wrapped = [[textwrap.wrap(cell, _CELL_CHARACTERS) for cell in row] for row in rows]
    widths = [max(len(line) for row in wrapped for line in row[i]) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(map(str.ljust, parts, widths)).rstrip()
        for row in wrapped
        for parts in itertools.zip_longest(*row, fillvalue="")
    )
