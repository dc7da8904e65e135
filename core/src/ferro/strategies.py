"""The parallel strategies of the installed plugins: list them, and get one by name."""

from __future__ import annotations

from ferro.errors import PluginError
from ferro.hookspecs import Strategy, StrategyInfo
from ferro.plugins.registry import by_name, how_to_install, installed, sole


def available() -> dict[str, str]:
    """List the installed strategies: name -> one-line summary. Broken plugins are left out; nothing is imported."""
    offers, _ = installed().survey("ferro_strategies", StrategyInfo)
    return {name: found[0].item.summary for name, found in by_name(offers).items() if len(found) == 1}


def get(name: str) -> Strategy:
    """Import a strategy, such as "ddp": a callable (module, group, **options) -> module.

    Raises:
        PluginError: it is not installed, two plugins claim the name, or a plugin is broken.
    """
    return info(name).load()


def info(name: str) -> StrategyInfo:
    """Return the description of a strategy, without importing it; raises as `get` does."""
    claimants = [it for it in installed().offers("ferro_strategies", StrategyInfo) if it.item.name == name]
    if not claimants:
        remedy = f"none is installed; ferro's own are installed {how_to_install('strategies')}"
        if others := ", ".join(available()):
            remedy = f"there are: {others}; check the spelling, or install the plugin that offers it"
        raise PluginError(f"no installed plugin offers the strategy {name!r}: {remedy}")
    return sole(claimants, f"strategy name {name!r}").item
