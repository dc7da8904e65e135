"""The world sizes with which a check of the conformance kit finds what it can find in a backend of few cases.

One rank has nobody to send to; of three ranks, no two orders or neighbours are the same. Two ranks differ from three
where messages between ranks are told apart: both neighbours of a rank are one, and its messages meet in one queue.
"""

from __future__ import annotations

from collections.abc import Callable

from ferro_testing import conformance

_MESSAGES = (
    conformance.check_transfers,
    conformance.check_tags,
    conformance.check_posted_transfers,
    conformance.check_exchange,
    conformance.check_transfer_programs,
)


def sizes_for(check: Callable[..., None], *, largest: int = 3) -> tuple[int, ...]:
    """Return the world sizes for a check."""
    return (1, 2, largest) if check in _MESSAGES else (1, largest)
