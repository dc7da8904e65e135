"""Strict discovery and loading of plugins; every error names the distribution at fault."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy

from ferro import hookspecs
from ferro.collectives.schedule import CollectiveInfo
from ferro.errors import PluginError

if TYPE_CHECKING:
    from importlib_metadata import EntryPoint

Item = TypeVar("Item")
Named = TypeVar("Named", "hookspecs.BackendInfo", "hookspecs.StrategyInfo", "hookspecs.CommandInfo")


@dataclass(frozen=True, slots=True)
class Offer(Generic[Item]):
    """Something a plugin offers, and the distribution that it came with."""

    item: Item
    distribution: str


@dataclass(frozen=True, slots=True)
class Loaded:
    distribution: str  # "name version"
    module: str
    hooks: tuple[str, ...]
    api_version: int | None  # None where the plugin states none
    import_s: float


@dataclass(frozen=True, slots=True)
class Broken:
    """A plugin that could not be loaded, or whose hook failed."""

    name: str
    error: PluginError


class Plugins:
    """All installed plugins: those that loaded, by entry-point name, and those that failed to load."""

    def __init__(self, entries: Iterable[EntryPoint]) -> None:
        self.loaded: dict[str, Loaded] = {}
        self.broken: list[Broken] = []
        self._managers: dict[str, pluggy.PluginManager] = {}
        self._answers: dict[str, tuple[list[Offer[Any]], list[Broken]]] = {}
        name_of = attrgetter("name")
        for name, claimants in itertools.groupby(sorted(entries, key=name_of), key=name_of):
            try:
                self._load(name, list(claimants))
            except PluginError as error:
                self.broken.append(Broken(name, error))

    def offers(self, hook: str, kind: type[Item]) -> list[Offer[Item]]:
        """List everything that plugins offer through a hook; if a plugin is broken, raise its error."""
        found, broken = self.survey(hook, kind)
        if broken:
            raise broken[0].error
        return found

    def survey(self, hook: str, kind: type[Item]) -> tuple[list[Offer[Item]], list[Broken]]:
        """As `offers`, but list the broken plugins; each plugin is asked once per process."""
        if hook not in self._answers:
            found, silent = self.ask(hook, kind)
            self._answers[hook] = found, [*self.broken, *silent]
        return self._answers[hook]

    def ask(self, hook: str, kind: type[Item]) -> tuple[list[Offer[Item]], list[Broken]]:
        """Ask every loaded plugin anew; return the offers, and the plugins whose hook failed."""
        found: list[Offer[Item]] = []
        broken: list[Broken] = []
        for name, manager in self._managers.items():
            distribution = self.loaded[name].distribution
            try:
                found += [Offer(item, distribution) for item in _call(manager, hook, kind, distribution)]
            except PluginError as error:
                broken.append(Broken(name, error))
        return found, broken

    def failing(self) -> list[Broken]:
        """Ask every hook of every plugin; list the plugins that failed to load or to tell."""
        kinds = {
            "ferro_backends": hookspecs.BackendInfo,
            "ferro_collectives": CollectiveInfo,
            "ferro_commands": hookspecs.CommandInfo,
            "ferro_observers": object,
            "ferro_strategies": hookspecs.StrategyInfo,
        }
        return [*self.broken, *(it for hook, kind in kinds.items() for it in self.ask(hook, kind)[1])]

    def versions(self) -> dict[str, str]:
        """Map plugins to "distribution version", for ranks to compare: without those that offer commands only."""
        return {name: it.distribution for name, it in self.loaded.items() if it.hooks != ("ferro_commands",)}

    def _load(self, name: str, claimants: Sequence[EntryPoint]) -> None:
        dists = [entry.dist for entry in claimants]
        distributions = sorted({f"{it.name} {it.version}" if it else "an unknown distribution" for it in dists})
        if len(distributions) > 1:
            raise _claimed_twice(f"plugin name {name!r}", distributions)
        entry, distribution = claimants[0], distributions[0]
        started = time.perf_counter()
        try:
            module = entry.load()
        except Exception as error:
            raise PluginError(
                f"plugin {name!r} of {distribution} failed to import ({entry.value}): "
                f"{type(error).__name__}: {error}. Repair or uninstall {distribution}."
            ) from error
        import_s = time.perf_counter() - started
        stated = getattr(module, "FERRO_API_VERSION", None)
        if stated is not None and (type(stated) is not int or stated != hookspecs.API_VERSION):
            from importlib_metadata import version  # as in `installed`

            raise PluginError(
                f"plugin {name!r} of {distribution} states FERRO_API_VERSION = {stated!r}; "
                f"ferro {version('ferro')} has plugin contract version {hookspecs.API_VERSION}. "
                f"Install a {distribution.partition(' ')[0]} and a ferro that were made for each other."
            )
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
        self._managers[name] = manager
        implemented = tuple(sorted(call.name for call in manager.get_hookcallers(module) or ()))
        self.loaded[name] = Loaded(distribution, entry.value, implemented, stated, import_s)


@lru_cache(maxsize=1)
def installed() -> Plugins:
    """Return the plugins of this environment, loaded once per process."""
    # Imported here, since only the search for plugins needs it, and `import ferro` should be quick.
    from importlib_metadata import entry_points

    return Plugins(entry_points(group="ferro"))


def by_name(offers: Iterable[Offer[Named]]) -> dict[str, list[Offer[Named]]]:
    """Collect the offers that claim each name, in the order of the names."""
    found: dict[str, list[Offer[Named]]] = {}
    for offer in offers:
        found.setdefault(offer.item.name, []).append(offer)
    return dict(sorted(found.items()))


def sole(claimants: Sequence[Offer[Item]], what: str) -> Offer[Item]:
    """Return the one offer that claims a name; raise PluginError where there are more."""
    if len(claimants) > 1:
        raise _claimed_twice(what, [offer.distribution for offer in claimants])
    return claimants[0]


def _claimed_twice(what: str, distributions: Iterable[str]) -> PluginError:
    return PluginError(f"the {what} is claimed by {' and by '.join(distributions)}: uninstall one of them")


def _call(manager: pluggy.PluginManager, hook: str, kind: type[Item], distribution: str) -> list[Item]:
    from ferro.runtime.environment import options  # as in `installed`

    caller = getattr(manager.hook, hook)
    if not caller.get_hookimpls():
        return []
    started = time.perf_counter()
    answer = "an error"
    try:
        results = caller()
        if not results:  # pluggy leaves None out
            raise PluginError(f"{hook}() of {distribution} returned None, not a sequence of descriptions")
        items = list(results[0])
        answer = ", ".join(str(getattr(item, "name", type(item).__name__)) for item in items) or "nothing"
    except PluginError:
        raise
    except Exception as error:
        raise PluginError(f"{hook}() of {distribution} raised {type(error).__name__}: {error}") from error
    finally:
        if options().trace_hooks:
            took_ms = 1e3 * (time.perf_counter() - started)
            line = f"ferro: {hook}() of {distribution}: {answer} ({took_ms:.1f} ms)"
            print(line, file=sys.stderr)  # noqa: T201 - FERRO_TRACE_HOOKS=1 asks for it
    for item in items:
        if kind is not object and not isinstance(item, kind):
            raise PluginError(f"{hook}() of {distribution} returned a {type(item).__name__}, not a {kind.__name__}")
        name = getattr(item, "name", "unnamed")  # observers and algorithms are not found by one name
        if kind is not object and not (isinstance(name, str) and re.fullmatch(r"\w[\w.+-]*", name)):
            raise PluginError(
                f"{hook}() of {distribution} offers something by the name {name!r}: a name is one word of letters, "
                "digits, '_', '.', '+' and '-'"
            )
    return items


def own_extras() -> list[str]:
    """Return the names of ferro's extras, which are the plugins that come with it."""
    from importlib_metadata import PackageNotFoundError, metadata  # as in `installed`

    try:
        extras = metadata("ferro").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return []
    return [extra for extra in extras if extra != "notebook"]  # brings a library only


def known_commands() -> dict[str, str]:
    """Map each command that one of ferro's extras brings, installed or not, to the extra.

    An entry-point group of ferro's own says which package offers each, so that core's source names no plugin.
    """
    from importlib_metadata import entry_points  # as in `installed`

    entries = entry_points(group="ferro.known_commands")
    extras = {it.name: it.value.removeprefix("ferro_").replace("_", "-") for it in entries}
    return {name: extra for name, extra in extras.items() if extra in own_extras()}


def backend_extras() -> list[str]:
    """Return the names of ferro's extras that bring a backend."""
    return [extra for extra in own_extras() if extra not in {"all", *known_commands().values()}]


def how_to_install(extra: str) -> str:
    """Explain the installation of one of ferro's own plugins; the public index has another "ferro"."""
    return (
        f"from where ferro came from: a checkout (pip install ./plugins/{extra}) or wheels "
        f"(pip install --find-links dist 'ferro[{extra}]')"
    )
