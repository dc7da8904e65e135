"""Dates, time spans, structured dtypes and float8 in the collectives and transfers that only move data."""

import ml_dtypes
import numpy as np
import pytest

from ferro import CollectiveMismatch, FerroError, UnsupportedError, UsageError, simulate

POINT = np.dtype([("name", "S3"), ("at", "f8", (2,)), ("day", "M8[D]")])
ROWS = {
    "dates": np.array(["2020-01-01", "NaT", "1969-12-31"], "M8[D]"),
    "time spans": np.array([3, -4, 5], "m8[ns]"),
    "foreign byte order": np.array([1, 2, 3], ">M8[s]"),
    "structured": np.array([("a", (1, 2), "2020-01-01")] * 3, POINT),
    "aligned": np.zeros(3, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
    "records": np.rec.fromarrays([[1, 2, 3], [1.5, 2.5, 3.5]], names="a,b"),
    "two dimensions": np.array([[1, 2], [3, 4], [5, 6]], "m8[s]"),
    "strided": np.array([("a", (1, 2), "2020-01-01")] * 6, POINT)[::2],
    "float8": np.array([[1, 2], [-3, np.nan], [np.inf, 0]], ml_dtypes.float8_e5m2),
    "int4": np.array([1, -2, 3], ml_dtypes.int4),
    "no rows": np.empty((0, 2), POINT),
}


def joined(*blocks):
    """Concatenate blocks, in their own byte order."""
    return np.concatenate(blocks).astype(blocks[0].dtype)


def same(result, expected):
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert str(result.tolist()) == str(expected.tolist())


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_are_moved_as_they_are(rows):
    def work(group):
        n, r = 3, group.rank
        twice = joined(*[np.asarray(rows)] * n)
        same(group.broadcast(rows if r == 1 else np.empty_like(rows), 1), rows)
        same(group.all_gather(rows), twice)
        same(group.all_gather(rows[:r], sizes="any", async_op=True).wait(), joined(rows[:1], rows[:2]))
        out = np.empty_like(twice)
        assert group.all_gather(rows, out=out) is out
        same(out, twice)
        if (gathered := group.gather(rows, 2)) is not None:
            same(gathered, twice)
        same(group.scatter(twice if r == 0 else None), rows)
        taken = np.empty(rows.shape, rows.dtype)
        assert group.scatter(twice if r == 0 else None, out=taken) is taken
        same(taken, rows)
        if len(rows):
            same(group.all_to_all(rows), joined(*[rows[r : r + 1]] * n))
        sizes = [len(rows), 0, 0]
        expected = joined(*[rows] * n) if r == 0 else rows[:0]
        same(group.all_to_all(rows, send_sizes=sizes), expected)
        buffer = np.empty(rows.shape, rows.dtype)
        group.sendrecv(rows, buffer, (r + 1) % n, (r - 1) % n)
        same(buffer, rows)

    simulate(work, 3)


def test_ranks_with_different_dtypes_are_told():
    def work(group):
        x = np.array([1], ("M8[s]", "M8[D]")[group.rank])
        try:
            group.all_gather(x)
        except CollectiveMismatch as error:
            return str(error)

    assert all("M8[s]" in text and "M8[D]" in text for text in simulate(work, 2))

    def fields(group):
        x = np.zeros(1, [(("a", "b")[group.rank], "i4")])
        with pytest.raises(CollectiveMismatch):
            group.broadcast(x)

    simulate(fields, 2)


@pytest.mark.parametrize(
    ("dtype", "error"), [("M8[D]", UsageError), ("M8[25s]", FerroError), ("i8", CollectiveMismatch)], ids=str
)
def test_a_message_is_not_received_as_another_dtype(dtype, error):
    def work(group):
        if group.rank == 0:
            group.send(np.array([1], "M8[s]"), 1, async_op=True)
            return
        with pytest.raises(error):
            group.recv(np.empty(1, dtype), 0)

    simulate(work, 2)


def test_no_arithmetic_is_done_on_them():
    def work(group):
        for call in (group.all_reduce, group.reduce, group.reduce_scatter, group.scan, group.min_loc):
            with pytest.raises(UnsupportedError, match="moved but not reduced: pass x"):
                call(ROWS["dates"][:1])
        with pytest.raises(UnsupportedError, match="pass its fields one by one"):
            group.all_reduce(ROWS["structured"], out=ROWS["structured"])
        with pytest.raises(UnsupportedError, match="no collective carries"):
            group.broadcast(np.zeros(1, [("a", "O")]))
        with pytest.raises(UnsupportedError, match="0-d array"):
            group.broadcast(ROWS["structured"][0])

    simulate(work, 1)
