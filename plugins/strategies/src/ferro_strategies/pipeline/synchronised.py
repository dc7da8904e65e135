"""Synchronised: a module that is wrapped in a data parallel strategy."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Synchronised(Protocol):
    """What DDP and FSDP offer to whoever makes many passes and wants one reduction."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients, without reducing them."""

    def sync_gradients(self) -> None:
        """Reduce what has been accumulated."""
