"""Sizes and times as people write them."""

from __future__ import annotations

_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> int:
    """Return the bytes that "4", "64K" or "16M" stands for.

    Raises:
        ValueError: it is no such size.
    """
    number = text.strip().upper().rstrip("KMG")
    factor = _FACTORS.get(text.strip().upper()[len(number) :])
    if factor is None or not number.isdigit() or int(number) == 0:
        raise ValueError(f"{text!r} is no size: write it as 4, 64K or 16M")
    return int(number) * factor


def size_text(nbytes: int) -> str:
    """Return a size such as "64 KiB"."""
    for name, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.4g} {name}"
    return f"{nbytes} B"


def time_text(seconds: float) -> str:
    """Return a time such as "412 us", with three digits."""
    for name, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {name}"
    return f"{seconds * 1e6:.3g} us"
