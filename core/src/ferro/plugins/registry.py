"""Strict discovery and loading of plugins; every error names the distribution at fault."""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy

from ferro import hookspecs
from ferro.collectives.schedule import CollectiveInfo
from ferro.errors import PluginError
from ferro.plugins.checks import ignored_fields, observer_problem, problem_of

if TYPE_CHECKING:
    from importlib_metadata import EntryPoint

Item = TypeVar("Item")
Named = TypeVar("Named", "hookspecs.BackendInfo", "hookspecs.StrategyInfo", "hookspecs.CommandInfo")


# True in a probe, which may ask for other backends: nobody has chosen one yet, so that no broken plugin is warned of.
probing: ContextVar[bool] = ContextVar("probing", default=False)


@dataclass(frozen=True, slots=True)
class Offer(Generic[Item]):
    """Something a plugin offers, and the distribution that it came with."""

    item: Item
    distribution: str
    newer: bool = False  # its plugin was made for a newer revision of the contract


@dataclass(frozen=True, slots=True)
class Loaded:
    distribution: str  # "name version"
    module: str
    hooks: tuple[str, ...]
    api_version: int | tuple[int, int] | None  # None where the plugin states none
    import_s: float
    unmarked: tuple[str, ...] = ()  # functions named as hooks are, without the mark of one
    newer: bool = False  # it states a newer revision of the contract

    @property
    def silence(self) -> str:
        """The reason why this plugin offers less than it seems to, or nothing; "" where all is well."""
        if self.unmarked:
            return f"its {' and '.join(self.unmarked)} cannot be heard: decorate it with @ferro.hookimpl"
        return "" if self.hooks else f"it offers nothing, for {self.module} has no function with @ferro.hookimpl"


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
        self._told: set[str] = set()
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

    def named(self, hook: str, kind: type[Item], wanted: Callable[[Item], bool], what: str) -> Offer[Item] | None:
        """Find the one offer of a name; None where there is none, and no broken plugin could have offered it.

        Beside an offer, each broken plugin is a RuntimeWarning, once per process.

        Raises:
            PluginError: two plugins claim the name; or none does, and a plugin is broken.
        """
        found, broken = self.survey(hook, kind)
        claimants = [offer for offer in found if wanted(offer.item)]
        if not claimants and broken:
            reason = broken[0].error
            raise PluginError(f"no plugin that works offers the {what}; and {reason}") from reason
        for it in broken:
            if it.name not in self._told and not probing.get():
                self._told.add(it.name)
                _warn(f"{it.error} (The {what} is another plugin's, and can be used.)")
        return sole(claimants, what) if claimants else None

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
            about = self.loaded[name]
            try:
                items = _call(manager, hook, kind, about)
                found += [Offer(item, about.distribution, about.newer) for item in items]
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
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"plugin {name!r} of {distribution} failed to import ({entry.value}): "
                f"{type(error).__name__}: {error}. Repair or uninstall {distribution}."
            ) from error
        import_s = time.perf_counter() - started
        stated, newer = getattr(module, "FERRO_API_VERSION", None), False
        if stated is not None:
            newer = _is_newer(stated, name, distribution)
        manager = pluggy.PluginManager("ferro")
        manager.add_hookspecs(hookspecs)
        hooks = sorted(hook for hook in vars(hookspecs) if hook.startswith("ferro_"))
        try:
            manager.register(module, name)
            unknown = sorted(set(_implemented(manager, module)) - set(hooks))
            if newer and unknown:
                text = f"plugin {name!r} of {distribution} implements {', '.join(unknown)}, which a newer ferro calls"
                _warn(f"{text}; this one does not: update ferro")
            else:
                manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(
                f"plugin {name!r} of {distribution} implements a hook that ferro does not "
                f"specify, or with other arguments: {error}. The hooks are {', '.join(hooks)}."
            ) from error
        self._managers[name] = manager
        implemented = tuple(hook for hook in _implemented(manager, module) if hook in hooks)
        unmarked = tuple(hook for hook in hooks if callable(getattr(module, hook, None)) and hook not in implemented)
        self.loaded[name] = Loaded(distribution, entry.value, implemented, stated, import_s, unmarked, newer)


def _implemented(manager: pluggy.PluginManager, module: object) -> list[str]:
    return sorted(call.name for call in manager.get_hookcallers(module) or ())


def _is_newer(stated: object, name: str, distribution: str) -> bool:
    """Say whether a plugin was made for a newer revision of the contract; refuse another version of it."""
    ours = (hookspecs.API_VERSION, hookspecs.API_REVISION)
    theirs = stated if isinstance(stated, tuple) else (stated, 0)
    if len(theirs) != 2 or any(type(part) is not int for part in theirs) or theirs[0] != ours[0]:
        from importlib_metadata import version  # as in `installed`

        raise PluginError(
            f"plugin {name!r} of {distribution} states FERRO_API_VERSION = {stated!r}; "
            f"ferro {version('ferro')} has plugin contract version {hookspecs.API_VERSION}. "
            f"Install a {distribution.partition(' ')[0]} and a ferro that were made for each other."
        )
    return theirs > ours


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


def load(offer: Offer[Any], what: str) -> Callable[..., Any]:
    """Import an offered strategy or command; raise PluginError where that fails."""
    try:
        loaded = offer.item.load()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"the {what} of {offer.distribution} failed to import: {type(error).__name__}: {error}. "
            f"Repair or uninstall {offer.distribution}."
        ) from error
    if not callable(loaded):
        raise PluginError(f"the {what} of {offer.distribution} is a {type(loaded).__name__}, no callable")
    return loaded  # type: ignore[no-any-return] # Any, since the description says what it is


def _warn(text: str) -> None:
    """Warn at the line of the program that called ferro."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("ferro"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def _claimed_twice(what: str, distributions: Iterable[str]) -> PluginError:
    return PluginError(f"the {what} is claimed by {' and by '.join(distributions)}: uninstall one of them")


def _call(manager: pluggy.PluginManager, hook: str, kind: type[Item], plugin: Loaded) -> list[Item]:
    from ferro.runtime.environment import options  # as in `installed`

    caller, origin = getattr(manager.hook, hook), f"{hook}() of {plugin.distribution}"
    if not caller.get_hookimpls():
        return []
    started = time.perf_counter()
    answer = "an error"
    ignored: set[str] = set()
    token = ignored_fields.set(ignored if plugin.newer else None)
    try:
        results = caller()
        if not results:  # pluggy leaves None out
            raise PluginError(f"{origin} returned None, not a sequence of descriptions")
        items = list(results[0])
        for item in items:
            if problem := observer_problem(item) if hook == "ferro_observers" else problem_of(item, kind):
                raise PluginError(f"{origin} returned {problem}")
        answer = ", ".join(str(getattr(item, "name", type(item).__name__)) for item in items) or "nothing"
    except PluginError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"{origin} raised {type(error).__name__}: {error}") from error
    finally:
        ignored_fields.reset(token)
        if options().trace_hooks:
            took_ms = 1e3 * (time.perf_counter() - started)
            line = f"ferro: {origin}: {answer} ({took_ms:.1f} ms)"
            print(line, file=sys.stderr)  # noqa: T201 - FERRO_TRACE_HOOKS=1 asks for it
    if ignored:
        text = (
            f"{origin} gives {', '.join(sorted(ignored))}, which a newer ferro knows; this one ignores it: update ferro"
        )
        _warn(text)
    return items
