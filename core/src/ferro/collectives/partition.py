"""Cutting a buffer into chunks: views, never copies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ferro.types import Array


def near_equal(buffer: Array, parts: int) -> list[Array]:
    """Cut a buffer into `parts` views whose sizes differ by at most one element."""
    bounds = [buffer.size * i // parts for i in range(parts + 1)]
    return [buffer[bounds[i] : bounds[i + 1]] for i in range(parts)]


def blocks(buffer: Array, counts: Sequence[int]) -> list[Array]:
    """Cut a buffer into views of `counts` elements."""
    ends = list(accumulate(counts))
    return [buffer[end - count : end] for end, count in zip(ends, counts, strict=True)]
