"""plan_buckets: which gradients share a bucket."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferro_strategies.ddp import plan_buckets


def plan(sizes, kinds=None, first=2, cap=6):
    kinds = kinds or ["float32"] * len(sizes)
    return plan_buckets(sizes, kinds, first_bucket_bytes=first, bucket_bytes=cap)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([2, 3, 3, 9, 1, 1], [[5, 4], [3], [2, 1], [0]]),  # the table in plan_buckets
        ([1], [[0]]),
        ([9], [[0]]),
        ([3, 9], [[1], [0]]),
        ([1, 1, 1], [[2, 1], [0]]),
        ([6, 2], [[1], [0]]),
        ([3, 3, 2], [[2], [1, 0]]),
        ([3, 3, 3, 2], [[3], [2, 1], [0]]),
        ([4, 0, 2], [[2, 1], [0]]),
    ],
)
def test_buckets_fill_from_the_end(sizes, expected):
    assert plan(sizes) == expected


def test_each_kind_has_buckets_of_its_own_ordered_by_their_last_gradient():
    kinds = ["a", "b", "a", "a", "b"]
    assert plan([1, 1, 1, 1, 1], kinds) == [[3, 2], [4, 1], [0]]


gradients = st.lists(st.tuples(st.integers(0, 20), st.sampled_from("ab")), min_size=1, max_size=30)


@given(gradients, st.integers(1, 12), st.integers(1, 24))
def test_every_gradient_has_one_place_within_the_cap(gradients, first, cap):
    sizes, kinds = [size for size, _ in gradients], [kind for _, kind in gradients]
    buckets = plan(sizes, kinds, first, cap)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(sizes)))
    seen = set()
    for bucket in sorted(buckets, key=lambda bucket: -bucket[0]):
        (kind,) = {kinds[index] for index in bucket}
        limit = cap if kind in seen else first
        seen.add(kind)
        assert sum(sizes[index] for index in bucket) <= limit or sizes[bucket[0]] > limit
        assert bucket == sorted(bucket, reverse=True)
        # After a gradient above the cap no room is left.
        if sizes[bucket[0]] > limit:
            assert not any(sizes[index] for index in bucket[1:])
    assert [bucket[-1] for bucket in buckets] == sorted((b[-1] for b in buckets), reverse=True)
