"""The algorithms that installed plugins offer, listed and by name."""

from __future__ import annotations

from ferro.collectives.schedule import CollectiveInfo
from ferro.errors import UsageError
from ferro.plugins.registry import installed


def available() -> dict[str, tuple[str, ...]]:
    """List, for each collective, the names of the algorithms that installed plugins offer."""
    found: dict[str, set[str]] = {}
    for offer in installed().survey("ferro_collectives", CollectiveInfo)[0]:
        found.setdefault(offer.item.collective, set()).add(offer.item.algorithm)
    return {collective: tuple(sorted(names)) for collective, names in sorted(found.items())}


def get(collective: str, algorithm: str) -> CollectiveInfo:
    """Find an algorithm by name.

    Raises:
        UsageError: no plugin offers it; the message lists those on offer.
        PluginError: two plugins offer it under one name; or none does, and a plugin is broken.
    """
    what = f"algorithm {algorithm!r} for {collective!r}"
    offer = installed().named(
        "ferro_collectives", CollectiveInfo, lambda it: (it.collective, it.algorithm) == (collective, algorithm), what
    )
    if offer is None:
        offered = available()
        if collective not in offered:
            raise UsageError(f"there is no collective {collective!r}; there are: {', '.join(offered)}")
        raise UsageError(f"no {what}; there are: {', '.join(offered[collective])}")
    return offer.item
