"""Which gradients share a bucket: arithmetic on sizes, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence


def plan_buckets(
    sizes: Sequence[int], kinds: Sequence[str], *, first_bucket_bytes: int, bucket_bytes: int
) -> list[list[int]]:
    """Put gradients into buckets, in the order in which a backward pass is expected to need them.

    A backward pass completes gradients roughly in reverse order of definition, so buckets are
    filled in that order. The first is small, so that communication starts early; the others are
    large, so that it is efficient. For sizes 2 3 3 9 1 1, caps of 2 and 6:

        parameter      0   1   2   3   4   5
        bytes          2   3   3   9   1   1
        bucket        (3) (2) (2) (1) (0) (0)      3 is larger than the cap, and so alone

    Args:
        sizes: bytes of each gradient, in order of definition.
        kinds: what each is made of (its dtype); a bucket holds one kind.
        first_bucket_bytes: most bytes in the first bucket of each kind.
        bucket_bytes: most bytes in every other bucket.

    Returns:
        Indices per bucket, each bucket in reverse order of definition. Buckets are ordered by
        when their last gradient is expected.
    """
    buckets: list[list[int]] = []
    current: dict[str, list[int]] = {}
    room: dict[str, int] = {}
    for index in reversed(range(len(sizes))):
        kind, size = kinds[index], sizes[index]
        if kind not in room or size > room[kind]:
            room[kind] = bucket_bytes if kind in room else first_bucket_bytes
            current[kind] = []
            buckets.append(current[kind])
        current[kind].append(index)
        room[kind] -= size
    return sorted(buckets, key=lambda bucket: -bucket[-1])
