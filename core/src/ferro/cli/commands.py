"""The commands on offer, core's own and those of plugins: which are installed, and one by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from ferro.errors import PluginError, UsageError
from ferro.hookspecs import CommandInfo
from ferro.plugins.registry import by_name, how_to_install, installed

# An entry-point group of ferro's own: the name of each command that an extra of ferro brings, and
# the package that offers it. So `ferro --help` knows commands that are not installed, and core's
# source names no plugin.
_KNOWN_COMMANDS = "ferro.known_commands"


def available() -> tuple[dict[str, CommandInfo], list[PluginError]]:
    """List the installed commands by name, and the errors of plugins that could not tell."""
    plugins = installed()
    offers, silent = plugins.survey("ferro_commands", CommandInfo)
    found: dict[str, CommandInfo] = {}
    errors = [broken.error for broken in (*plugins.broken, *silent)]
    for name, offer in by_name(offers, "command").items():
        if isinstance(offer, PluginError):
            errors.append(offer)
        else:
            found[name] = offer.item
    return found, errors


def load(name: str) -> Callable[[Sequence[str]], int]:
    """Import one command.

    Raises:
        UsageError: nobody offers the command; the message says which extra brings it, or what there
            is.
        PluginError: two plugins claim the name, or the command's plugin could not be imported; the
            message names the distribution.
    """
    offers, _ = installed().survey("ferro_commands", CommandInfo)
    offer = by_name(offers, "command").get(name)
    if isinstance(offer, PluginError):
        raise offer
    if offer is None:
        raise _absent(name)
    try:
        return offer.item.load()
    except ImportError as error:
        raise PluginError(
            f"the command {name!r} of {offer.distribution} failed to import: "
            f"{type(error).__name__}: {error}. Repair or uninstall {offer.distribution}."
        ) from error


def extras_of_absent_commands(present: Collection[str]) -> dict[str, str]:
    """Look up, for each command that ferro's extras bring and that is not present, the extra."""
    from importlib_metadata import PackageNotFoundError, distribution  # as late as possible

    try:
        ferro = distribution("ferro")
    except PackageNotFoundError:
        return {}
    extras = {}
    for requirement in ferro.requires or []:
        if match := re.match(r"([\w-]+).*extra == ['\"]([\w-]+)['\"]", requirement):
            package, extra = match.groups()
            if package == f"ferro-{extra}":
                extras[package.replace("-", "_")] = extra
    known = ferro.entry_points.select(group=_KNOWN_COMMANDS)
    return {entry.name: extras[entry.value] for entry in known if entry.name not in present and entry.value in extras}


def _absent(name: str) -> UsageError | PluginError:
    """Make the error for a command that nobody offers."""
    found, broken = available()
    extra = extras_of_absent_commands(found).get(name)
    if broken:  # the command may well be one that a broken plugin would offer
        return PluginError(f"no installed plugin offers the command {name!r}; {broken[0]}")
    if extra is not None:
        return UsageError(
            f"the command {name!r} is not installed: the extra {extra!r} brings it, {how_to_install(extra)}"
        )
    return UsageError(f"there is no command {name!r}; there are: {', '.join(sorted(found))}; see `ferro --help`")
