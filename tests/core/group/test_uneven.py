"""Uneven sizes: layouts of blocks, the sizes that are refused, and the header of a scatter."""

import numpy as np
import pytest

from ferro.errors import CollectiveMismatch, UsageError
from ferro.group.uneven import (
    HEADER_BYTES,
    Layout,
    checked_sizes,
    gathered_layout,
    header_of,
    read_header,
    split_layout,
    tell_header,
)
from ferro.simulated import simulate
from ferro_testing.samples import dtype_of

RANKS = 3


def test_blocks_follow_each_other():
    layout = Layout.of([2, 0, 3], (4, 5))
    assert layout.shape == (5, 4, 5)
    assert layout.counts == (40, 0, 60)
    assert list(layout.slices) == [slice(0, 2), slice(2, 2), slice(2, 5)]
    assert [layout.block_shape(rank) for rank in range(3)] == [(2, 4, 5), (0, 4, 5), (3, 4, 5)]


@pytest.mark.parametrize(
    ("shape", "sizes", "expected"),
    [
        ((3, 2), None, ((9, 2), (3, 3, 3), (6, 6, 6))),
        ((3, 2), (1, 3, 0), ((4, 2), (1, 3, 0), (2, 6, 0))),
        ((), None, ((3,), (1, 1, 1), (1, 1, 1))),
        ((2, 0), None, ((6, 0), (2, 2, 2), (0, 0, 0))),
    ],
)
def test_blocks_are_gathered(shape, sizes, expected):
    layout = gathered_layout(shape, sizes, 1, 3)
    assert (layout.shape, layout.rows, layout.counts) == expected


@pytest.mark.parametrize(
    ("shape", "sizes", "expected"),
    [
        ((6, 2), None, ((6, 2), (2, 2, 2), (4, 4, 4))),
        ((6, 2), (5, 0, 1), ((6, 2), (5, 0, 1), (10, 0, 2))),
        ((0, 2), None, ((0, 2), (0, 0, 0), (0, 0, 0))),
    ],
)
def test_an_array_is_cut(shape, sizes, expected):
    layout = split_layout(shape, sizes, 3, "scatter")
    assert (layout.shape, layout.rows, layout.counts) == expected


def test_a_wrong_size_of_this_rank_is_refused_each_time():
    for _ in range(2):
        with pytest.raises(UsageError, match=r"sizes\[1\] is 2, but x has 4 rows on this rank"):
            gathered_layout((4,), (4, 2), 1, 2)
    assert gathered_layout((4,), (4, 2), 0, 2).shape == (6,)


@pytest.mark.parametrize(
    ("shape", "sizes", "match"),
    [
        ((), None, "scatter cuts its input along axis 0, and a 0-d array has none"),
        ((5,), None, "into 2 equal blocks, but it has 5 rows: give parts= for uneven ones"),
        ((5,), (2, 2), "parts sum up to 4, but axis 0 has 5 rows"),
    ],
)
def test_what_cannot_be_cut_is_refused(shape, sizes, match):
    with pytest.raises(UsageError, match=match):
        split_layout(shape, sizes, 2, "scatter", "parts")


@pytest.mark.parametrize("sizes", [[1, 2], (1, 2), np.array([1, 2]), (n for n in (1, 2))], ids=type)
def test_sizes_may_be_any_whole_numbers(sizes):
    rows = checked_sizes(sizes, 2)
    assert rows == (1, 2)
    assert [type(size) for size in rows] == [int, int]


@pytest.mark.parametrize("sizes", [[1], [1, 2, 3], [1, -1], [1, 2.0], 3, ["1", "2"]], ids=str)
def test_other_sizes_are_refused(sizes):
    with pytest.raises(UsageError, match="parts must be 2"):
        checked_sizes(sizes, 2, "parts")


@pytest.mark.parametrize("row_shape", [(), (5,), (2, 0, 7), (1,) * 63], ids=len)
@pytest.mark.parametrize("rows", [[4, 0, 1 << 40], [4, 4, 4]], ids=["uneven", "even"])
@pytest.mark.parametrize("name", ["bool", "bfloat16", "c16"])
def test_a_header_is_told_in_one_message_or_two(name, rows, row_shape):
    dtype, layout, sent = dtype_of(name), Layout.of(rows, row_shape), []
    header = header_of(dtype, layout)
    assert tell_header(header, lambda message: sent.append(message.copy())) == header

    def receive(message):
        message[...] = sent.pop(0)

    sizes = [message.size for message in sent]
    assert sizes == ([HEADER_BYTES] if len(header) == HEADER_BYTES else [HEADER_BYTES, len(header)])
    first = sent[0].tobytes()
    told = tell_header(b"", receive)
    assert not sent
    assert read_header(told, RANKS) == (dtype, layout)
    assert tell_header(header, lambda message: sent.append(message.size), first) == header, "the first one was told"
    assert sent == sizes[1:]


@pytest.mark.parametrize("sizes", [None, [1, 0, 5]])
@pytest.mark.parametrize("root", range(RANKS))
def test_the_other_ranks_learn_dtype_and_shape_from_the_root(root, sizes):
    whole = np.arange(12, dtype=np.int16).reshape(6, 2)

    def work(group):
        block = group.scatter(whole if group.rank == root else None, root, sizes=sizes)
        return block.dtype, block.tolist()

    rows = sizes or [2, 2, 2]
    expected = [(whole.dtype, block.tolist()) for block in np.split(whole, np.cumsum(rows)[:-1])]
    assert simulate(work, RANKS, timeout_s=5, run_timeout_s=20) == expected


def test_ranks_exchange_their_rows_by_themselves():
    def work(group):
        mine = np.full((group.rank, 2), group.rank)
        expected = np.repeat(np.arange(3), np.arange(3))[:, None] * [1, 1]
        np.testing.assert_array_equal(group.all_gather(mine, sizes="any"), expected)
        out = np.empty_like(expected)
        assert group.all_gather(mine, sizes="any", out=out, async_op=True).wait() is out
        np.testing.assert_array_equal(out, expected)
        gathered = group.gather(mine, 1, sizes="any")
        assert (gathered is None) == (group.rank != 1)
        if gathered is not None:
            np.testing.assert_array_equal(gathered, expected)
        assert group.all_gather(group.rank, sizes="any").tolist() == [0, 1, 2]
        with pytest.raises(UsageError, match="sizes must be 3 whole numbers, not 'all'"):
            group.all_gather(mine, sizes="all")

    simulate(work, 3)


@pytest.mark.parametrize("method", ["all_gather", "gather"])
def test_the_error_for_different_rows_names_sizes(method):
    def work(group):
        with pytest.raises(CollectiveMismatch, match='different numbers of rows, give sizes="any"'):
            getattr(group, method)(np.ones((group.rank + 1, 2)))

    simulate(work, 2)
