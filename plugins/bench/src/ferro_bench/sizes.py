"""Sizes and times as people write them."""

from __future__ import annotations

import re

from ferro.errors import UsageError

DEFAULT_FACTOR = 4
MAX_BYTES = 64 << 30
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> int:
    """Return the bytes that "4", "4B", "64KiB", "16M" or "1GiB" stands for.

    Raises:
        UsageError: it is no such size, or more than 64 GiB.
    """
    found = re.fullmatch(r"(\d+)(?:([KMG])(?:I?B)?|B)?", text.strip().upper())
    nbytes = int(found[1]) * _UNITS[found[2] or ""] if found else 0
    if not 0 < nbytes <= MAX_BYTES:
        raise UsageError(f"{text!r} is no size from 1 B to 64 GiB: write it as 4B, 64KiB or 16MiB")
    return nbytes


def parse_sizes(text: str) -> tuple[int, ...]:
    """Return the sizes of "FROM:TO", "FROM:TO:FACTOR" or a list with commas, in bytes.

    Raises:
        UsageError: the text is none of them.
    """
    if ":" not in text:
        return tuple(parse_size(part) for part in text.split(","))
    first, last, *rest = text.split(":")
    factor = rest[0] if rest else str(DEFAULT_FACTOR)
    if len(rest) > 1 or not factor.isdigit() or int(factor) < 2:
        raise UsageError(f"{text!r}: write sizes as 4B:256MiB, or 4B:256MiB:2 for another factor")
    sizes = [parse_size(first)]
    largest = parse_size(last)
    if sizes[0] > largest:
        raise UsageError(f"{text!r}: the first size is larger than the last; swap them")
    while (following := sizes[-1] * int(factor)) <= largest:
        sizes.append(following)
    return tuple(sizes)


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
