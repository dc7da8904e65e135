"""The algorithms that installed plugins offer, listed and by name."""

from __future__ import annotations

from ferro.collectives.schedule import CollectiveInfo
from ferro.errors import UsageError
from ferro.plugins.registry import installed, sole


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
        PluginError: two plugins offer it under one name, or a plugin is broken.
    """
    offers = installed().offers("ferro_collectives", CollectiveInfo)
    claimants = [it for it in offers if (it.item.collective, it.item.algorithm) == (collective, algorithm)]
    if not claimants:
        offered = available()
        if collective not in offered:
            raise UsageError(f"there is no collective {collective!r}; there are: {', '.join(offered)}")
        others = ", ".join(offered[collective])
        raise UsageError(f"no algorithm {algorithm!r} for {collective!r}; there are: {others}")
    return sole(claimants, f"algorithm {algorithm!r} for {collective!r}").item
