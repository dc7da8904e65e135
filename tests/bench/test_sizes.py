"""Sizes as people write them, and what becomes of them."""

import pytest

from ferro.errors import UsageError
from ferro_bench.measure import make_case
from ferro_bench.sizes import parse_size, parse_sizes, size_text, time_text


@pytest.mark.parametrize(
    ("text", "nbytes"), [("4", 4), ("4B", 4), ("64K", 65536), ("64KiB", 65536), ("1mib", 1 << 20), (" 2GiB ", 2 << 30)]
)
def test_a_size_is_read(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-4", "K", "4X", "1.5K", "4iB", "65GiB", "4 4"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


def test_a_range_goes_by_its_factor_to_its_end():
    assert parse_sizes("4B:1KiB") == (4, 16, 64, 256, 1024)
    assert parse_sizes("4:40:3") == (4, 12, 36)
    assert len(parse_sizes("4B:256MiB")) == 14


def test_a_list_is_as_it_is_written():
    assert parse_sizes("1MiB,4,4KiB") == (1 << 20, 4, 4096)


@pytest.mark.parametrize("text", ["4:1K:1", "4:1K:x", "1K:4", "4:", "4:8:2:2"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UsageError):
        parse_sizes(text)


@pytest.mark.parametrize(
    ("collective", "nbytes", "count"),
    [("all_reduce", 10, 2), ("all_gather", 4, 3), ("all_to_all", 100, 24), ("barrier", 64, 0), ("broadcast", 1, 1)],
)
def test_a_case_has_what_ranks_can_cut_but_never_nothing(collective, nbytes, count):
    assert make_case(collective, nbytes, 3).count == count


@pytest.mark.parametrize(
    ("nbytes", "calls", "settles"), [(4, 60, 1), (64 << 10, 20, 1), (1 << 20, 8, 1), (16 << 20, 1, 0)]
)
def test_a_turn_has_fewer_calls_the_larger_they_are(nbytes, calls, settles):
    case = make_case("all_reduce", nbytes, 2)
    assert (case.calls, case.settles) == (calls, settles)


def test_texts():
    assert [size_text(n) for n in (0, 4, 1536, 1 << 20, 3 << 30)] == ["0 B", "4 B", "1.5 KiB", "1 MiB", "3 GiB"]
    assert [time_text(s) for s in (4.12e-7, 4.12e-5, 0.0412, 4.12)] == ["0.412 us", "41.2 us", "41.2 ms", "4.12 s"]
