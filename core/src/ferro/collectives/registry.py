"""The algorithms on offer, ours and those of plugins, and one by name."""

from __future__ import annotations

from collections.abc import Iterable

from ferro.collectives.schedule import CollectiveInfo
from ferro.errors import PluginError, UsageError
from ferro.plugins.registry import Offer, installed


def available() -> dict[str, tuple[str, ...]]:
    """Return collective -> names of the algorithms that installed plugins offer for it."""
    found: dict[str, list[str]] = {}
    offers, _ = installed().survey("ferro_collectives", CollectiveInfo)
    for collective, algorithm in sorted(_table(offers)):
        found.setdefault(collective, []).append(algorithm)
    return {collective: tuple(names) for collective, names in found.items()}


def get(collective: str, algorithm: str) -> CollectiveInfo:
    """Return an algorithm.

    Raises:
        UsageError: nobody offers it; lists those that there are.
        PluginError: two plugins offer it under one name, or a plugin is broken.
    """
    installed().require_all()
    offers = installed().offers("ferro_collectives", CollectiveInfo)
    claims = _table(offers).get((collective, algorithm), [])
    if not claims:
        if collective not in available():
            there = ", ".join(available())
            raise UsageError(f"there is no collective {collective!r}; there are: {there}")
        others = ", ".join(available()[collective])
        raise UsageError(f"no algorithm {algorithm!r} for {collective!r}; there are: {others}")
    if len(claims) > 1:
        distributions = " and by ".join(distribution for _, distribution in claims)
        raise PluginError(
            f"the algorithm {algorithm!r} for {collective!r} is claimed by {distributions}: uninstall one of them"
        )
    return claims[0][0]


def _table(offers: Iterable[Offer[CollectiveInfo]]) -> dict[tuple[str, str], list[tuple[CollectiveInfo, str]]]:
    table: dict[tuple[str, str], list[tuple[CollectiveInfo, str]]] = {}
    for offer in offers:
        key = (offer.item.collective, offer.item.algorithm)
        table.setdefault(key, []).append((offer.item, offer.distribution))
    return table
