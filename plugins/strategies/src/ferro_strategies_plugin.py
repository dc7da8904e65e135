"""What ferro-strategies offers to ferro: its strategies, by name.

A module beside the package, not in it: asking what is installed must not import the layers and
optimizers that the package's own first line re-exports.
"""

from __future__ import annotations

from collections.abc import Sequence

from ferro.hookspecs import Strategy, StrategyInfo, hookimpl


def _load_ddp() -> Strategy:
    from ferro_strategies.ddp import DDP

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
