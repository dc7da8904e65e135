"""The parallel strategies of the installed plugins: list them, and get one by name."""

from __future__ import annotations

from ferro.errors import PluginError
from ferro.hookspecs import Strategy, StrategyInfo
from ferro.plugins.registry import by_name, how_to_install, installed


def available() -> dict[str, str]:
    """List the installed strategies: name -> one-line summary. A broken plugin's are left out; nothing is imported."""
    offers, _ = installed().survey("ferro_strategies", StrategyInfo)
    named = sorted(by_name(offers, "strategy").items())
    return {name: offer.item.summary for name, offer in named if not isinstance(offer, PluginError)}


def get(name: str) -> Strategy:
    """Import a strategy, such as "ddp": a callable (module, group, **options) -> module.

    Raises:
        PluginError: it is not installed, two plugins claim the name, or a plugin is broken.
    """
    return info(name).load()


def info(name: str) -> StrategyInfo:
    """Return the description of a strategy, without importing it; raises as `get` does."""
    plugins = installed()
    plugins.require_all()
    offer = by_name(plugins.offers("ferro_strategies", StrategyInfo), "strategy").get(name)
    if isinstance(offer, PluginError):
        raise offer
    if offer is None:
        remedy = f"none is installed; ferro's own are installed {how_to_install('strategies')}"
        if others := ", ".join(available()):
            remedy = f"there are: {others}; check the spelling, or install the plugin that offers it"
        raise PluginError(f"no installed plugin offers the strategy {name!r}: {remedy}")
    return offer.item
