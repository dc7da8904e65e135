"""What ferro-strategies offers to ferro: its strategies, by name; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence

from ferro.hookspecs import Strategy, StrategyInfo, hookimpl


def _load_ddp() -> Strategy:
    from .ddp import DDP

    return DDP


@hookimpl
def ferro_strategies() -> Sequence[StrategyInfo]:
    """Offer the strategies of this distribution."""
    return (
        StrategyInfo(
            name="ddp",
            summary="every rank has the whole model; gradients are averaged in buckets",
            load=_load_ddp,
        ),
    )
