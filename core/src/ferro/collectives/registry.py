"""The algorithms that installed plugins offer, listed and by name."""

from __future__ import annotations

from ferro.collectives.schedule import CollectiveInfo
from ferro.errors import PluginError, UsageError
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
        PluginError: two plugins offer it under one name, or a plugin is broken.
    """
    installed().require_all()
    offers = installed().offers("ferro_collectives", CollectiveInfo)
    claims = [offer for offer in offers if (offer.item.collective, offer.item.algorithm) == (collective, algorithm)]
    if not claims:
        offered = available()
        if collective not in offered:
            raise UsageError(f"there is no collective {collective!r}; there are: {', '.join(offered)}")
        others = ", ".join(offered[collective])
        raise UsageError(f"no algorithm {algorithm!r} for {collective!r}; there are: {others}")
    if len(claims) > 1:
        distributions = " and by ".join(offer.distribution for offer in claims)
        raise PluginError(
            f"the algorithm {algorithm!r} for {collective!r} is claimed by {distributions}: uninstall one of them"
        )
    return claims[0].item
