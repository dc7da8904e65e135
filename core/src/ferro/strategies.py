"""The parallel strategies of the installed plugins: list them, and get one by name."""

from __future__ import annotations

from ferro.errors import PluginError
from ferro.hookspecs import Strategy, StrategyInfo
from ferro.plugins.registry import Offer, by_name, installed, load


def available() -> dict[str, str]:
    """List the installed strategies: name -> one-line summary. Broken plugins are left out; nothing is imported."""
    offers, _ = installed().survey("ferro_strategies", StrategyInfo)
    return {name: found[0].item.summary for name, found in by_name(offers).items() if len(found) == 1}


def get(name: str) -> Strategy:
    """Import a strategy, such as "ddp": a callable (module, group, **options) -> module.

    Raises:
        PluginError: it is not installed, two plugins claim the name, or its plugin is broken.
    """
    return load(_offer(name), f"strategy {name!r}")


def info(name: str) -> StrategyInfo:
    """Return the description of a strategy, without importing it; raises as `get` does."""
    return _offer(name).item


def _offer(name: str) -> Offer[StrategyInfo]:
    what = f"strategy name {name!r}"
    offer = installed().named("ferro_strategies", StrategyInfo, lambda info: info.name == name, what)
    if offer is None:
        if others := ", ".join(available()):
            remedy = f"there are: {others}; check the spelling, or install the plugin that offers it"
        else:
            from ferro.plugins.extras import how_to_install  # here, for `import ferro` does without its imports

            remedy = f"none is installed; install ferro's own: {how_to_install('strategies')}"
        raise PluginError(f"no installed plugin offers the strategy {name!r}: {remedy}")
    return offer
