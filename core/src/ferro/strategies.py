"""The parallel strategies on offer: which are installed, and one by name."""

from __future__ import annotations

from ferro.errors import PluginError
from ferro.hookspecs import Strategy, StrategyInfo
from ferro.plugins.registry import Offer, by_name, how_to_install, installed


def available() -> dict[str, str]:
    """Return name -> one-line summary for every installed strategy."""
    offers, _ = installed().survey("ferro_strategies", StrategyInfo)
    return {
        name: offer.item.summary
        for name, offer in sorted(by_name(offers, "strategy").items())
        if not isinstance(offer, PluginError)
    }


def get(name: str) -> Strategy:
    """Return a strategy: a callable (module, group, **options) -> module.

    Raises:
        PluginError: it is not installed, two plugins claim the name, or a plugin is broken.
    """
    return info(name).load()


def info(name: str) -> StrategyInfo:
    """Return the description of a strategy; raises as `get` does."""
    installed().require_all()
    offer = _table().get(name)
    if isinstance(offer, PluginError):
        raise offer
    if offer is None:
        others = ", ".join(available())
        if others:
            remedy = f"there are: {others}; check the spelling, or install the plugin that offers it"
        else:
            remedy = f"none is installed; ferro's own are installed {how_to_install('strategies')}"
        raise PluginError(f"no installed plugin offers the strategy {name!r}: {remedy}")
    return offer.item


def _table() -> dict[str, Offer[StrategyInfo] | PluginError]:
    return by_name(installed().offers("ferro_strategies", StrategyInfo), "strategy")
