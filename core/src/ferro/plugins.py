"""Strict discovery and loading of plugins; every error names the distribution at fault."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import pluggy

from ferro import hookspecs
from ferro.errors import PluginError

if TYPE_CHECKING:
    from importlib_metadata import EntryPoint

GROUP = "ferro"
Item = TypeVar("Item")
Named = TypeVar("Named", bound="HasName")


class HasName(Protocol):
    """A description that is found by its name."""

    @property
    def name(self) -> str:
        """The name."""


@dataclass(frozen=True, slots=True)
class Offer(Generic[Item]):
    """Something a plugin offers, and the distribution that it came with."""

    item: Item
    distribution: str


@dataclass(frozen=True, slots=True)
class Broken:
    """A plugin that could not be loaded."""

    name: str
    error: PluginError


class Plugins:
    """All installed plugins, loaded, and those that failed to.

    Attributes:
        versions: entry-point name -> "distribution version", for ranks to compare.
        broken: the plugins that failed, with the error of each.
    """

    def __init__(self, entries: Iterable[EntryPoint]) -> None:
        self.versions: dict[str, str] = {}
        self.broken: list[Broken] = []
        self._managers: dict[str, pluggy.PluginManager] = {}
        by_name: dict[str, list[EntryPoint]] = {}
        for entry in entries:
            by_name.setdefault(entry.name, []).append(entry)
        for name, claims in sorted(by_name.items()):
            try:
                self._load(name, claims)
            except PluginError as error:
                self.broken.append(Broken(name, error))

    def require_all(self) -> None:
        """Raise the error of the first plugin that failed to load, if any did."""
        if self.broken:
            raise self.broken[0].error

    def offers(self, hook: str, kind: type[Item]) -> list[Offer[Item]]:
        """Return what all plugins offer through a hook.

        Raises:
            PluginError: the hook raised, or returned something else.
        """
        found, broken = self.survey(hook, kind)
        if broken:
            raise broken[0].error
        return found

    def survey(self, hook: str, kind: type[Item]) -> tuple[list[Offer[Item]], list[Broken]]:
        """Return what plugins offer through a hook, and the plugins that failed to tell."""
        found: list[Offer[Item]] = []
        broken: list[Broken] = []
        for name, manager in self._managers.items():
            distribution = self.versions[name]
            try:
                items = _call(manager, hook, kind, distribution)
            except PluginError as error:
                broken.append(Broken(name, error))
            else:
                found += [Offer(item, distribution) for item in items]
        return found, broken

    def _load(self, name: str, claims: Sequence[EntryPoint]) -> None:
        distributions = sorted({_distribution(entry) for entry in claims})
        if len(distributions) > 1:
            raise PluginError(
                f"the plugin name {name!r} is claimed by {' and by '.join(distributions)}: "
                "uninstall one of them"
            )
        entry, distribution = claims[0], distributions[0]
        try:
            module = entry.load()
        except Exception as error:
            raise PluginError(
                f"plugin {name!r} of {distribution} failed to import ({entry.value}): "
                f"{type(error).__name__}: {error}. Repair or uninstall {distribution}."
            ) from error
        manager = pluggy.PluginManager("ferro")
        manager.add_hookspecs(hookspecs)
        try:
            manager.register(module, name)
            manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            hooks = sorted(hook for hook in vars(hookspecs) if hook.startswith("ferro_"))
            raise PluginError(
                f"plugin {name!r} of {distribution} implements a hook that ferro does not "
                f"specify, or with other arguments: {error}. The hooks are {', '.join(hooks)}."
            ) from error
        self.versions[name] = distribution
        self._managers[name] = manager


@lru_cache(maxsize=1)
def installed() -> Plugins:
    """Return the plugins of this environment, loaded once per process."""
    # Here, so that `import ferro` does not pay for what only looking for plugins needs.
    from importlib_metadata import entry_points

    return Plugins(entry_points(group=GROUP))


def by_name(offers: Iterable[Offer[Named]], what: str) -> dict[str, Offer[Named] | PluginError]:
    """Return offers by name; for a name that is claimed twice, the error that says so."""
    table: dict[str, Offer[Named] | PluginError] = {}
    claimants: dict[str, list[str]] = {}
    for offer in offers:
        name = offer.item.name
        claimants.setdefault(name, []).append(offer.distribution)
        table[name] = offer
    for name, distributions in claimants.items():
        if len(distributions) > 1:
            table[name] = PluginError(
                f"the {what} name {name!r} is claimed by {' and by '.join(distributions)}: "
                "uninstall one of them"
            )
    return table


def _call(
    manager: pluggy.PluginManager, hook: str, kind: type[Item], distribution: str
) -> list[Item]:
    try:
        items = [item for result in getattr(manager.hook, hook)() for item in result]
    except Exception as error:
        raise PluginError(
            f"{hook}() of {distribution} raised {type(error).__name__}: {error}"
        ) from error
    for item in items:
        if kind is not object and not isinstance(item, kind):
            raise PluginError(
                f"{hook}() of {distribution} returned a {type(item).__name__}, "
                f"not a {kind.__name__}"
            )
    return items


def _distribution(entry: EntryPoint) -> str:
    """Return "name version" of the distribution that an entry point came with."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def own_extras() -> list[str]:
    """Return the names of ferro's extras: of the plugins that come with it."""
    from importlib_metadata import PackageNotFoundError, metadata  # as in `installed`

    try:
        return metadata("ferro").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return []


def how_to_install(extra: str) -> str:
    """Say how one of ferro's own plugins is installed; the public index has another "ferro"."""
    return (
        f"from where ferro came from: a checkout (pip install ./plugins/{extra}) or wheels "
        f"(pip install --find-links dist 'ferro[{extra}]')"
    )
