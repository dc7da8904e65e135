"""The extras of ferro: their names, the commands that they bring, how each is installed from where ferro came from."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from importlib_metadata import PackageNotFoundError, distribution, entry_points, metadata


def own_extras() -> list[str]:
    """Return the names of ferro's extras that bring plugins of its own."""
    return [
        extra for extra in _metadata("Provides-Extra") if any(it.startswith("ferro-") for it in _requirements(extra))
    ]


def known_commands() -> dict[str, str]:
    """Map each command that one of ferro's extras brings, installed or not, to the extra.

    An entry-point group of ferro's own says which package offers each, so that core's source names no plugin.
    """
    entries = entry_points(group="ferro.known_commands")
    extras = {it.name: it.value.removeprefix("ferro_").replace("_", "-") for it in entries}
    return {name: extra for name, extra in extras.items() if extra in own_extras()}


def backend_extras() -> list[str]:
    """Return the names of ferro's extras that bring a backend."""
    return [extra for extra in own_extras() if extra not in {"all", *known_commands().values()}]


def how_to_install(extra: str) -> str:
    """Write the command that installs one of ferro's extras, and works in any folder.

    The public index has another project called "ferro". The command therefore names what lies beside this ferro, in
    its checkout or in its folder of wheels; where that is unknown, it names exact versions.
    """
    origin = _origin()
    command = f"pip install {' '.join(shlex.quote(_beside(origin, it)) for it in _requirements(extra))}"
    return command if origin else f"{command} (with --find-links FOLDER, where ferro came from a folder of wheels)"


def _requirements(extra: str) -> list[str]:
    of_extra = re.compile(rf"(.*?)\s*;.*extra\s*==\s*['\"]{re.escape(extra)}['\"]")
    return [found[1] for line in _metadata("Requires-Dist") if (found := of_extra.match(line))]


def _metadata(key: str) -> list[str]:
    try:
        return metadata("ferro").get_all(key) or []
    except PackageNotFoundError:
        return []


def _origin() -> Path | None:
    """Find the checkout, or the folder of wheels, that ferro was installed from; None where pip recorded none."""
    try:
        url = urlsplit(json.loads(distribution("ferro").read_text("direct_url.json") or "{}").get("url", ""))
    except (PackageNotFoundError, ValueError):
        return None
    return Path(url2pathname(url.path)).parent if url.scheme == "file" else None


def _beside(origin: Path | None, requirement: str) -> str:
    """Find the source or the wheel of one of ferro's own distributions beside ferro's; others stay as they are."""
    own = re.match(r"ferro-([\w-]+)==([\w.]+)$", requirement)
    if origin is None or own is None:
        return requirement
    name, version = own.groups()
    wheels = origin.glob(f"ferro_{name.replace('-', '_')}-{version}-*.whl")
    checkout = origin / "plugins" / name
    return str(checkout if (checkout / "pyproject.toml").exists() else next(wheels, requirement))
