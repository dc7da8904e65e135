"""Results of native and other collectives, limits of counts and tags, lifetime of buffers."""

from __future__ import annotations

import pytest

from . import programs


def test_results_are_numpys_also_where_mpis_differ(mpi, on_ranks):
    results = on_ranks(mpi, programs.native_and_gathered, 3)
    assert results[0][2:] == [True] * 2
    assert results == [results[0]] * 3


def test_half_precision_in_pieces(mpich, on_ranks):
    assert on_ranks(mpich, programs.dtypes, 2) == [[True, True]] * 2


def test_counts_beyond_mpis_are_cut(mpi, on_ranks):
    assert on_ranks(mpi, programs.cut, 2) == [[]] * 2


def test_long_messages_are_cut(mpi, on_ranks):
    assert on_ranks(mpi, programs.cut_messages, 2) == [True] * 2


def test_a_tag_beyond_mpis_is_refused_and_the_group_goes_on(mpi, on_ranks):
    for text, total in on_ranks(mpi, programs.large_tag, 2):
        assert total == 2
        assert (mpi.name == "mpich") == ("too large for this MPI" in text)


def test_buffers_live_as_long_as_mpi_needs_them(mpi, on_ranks):
    assert on_ranks(mpi, programs.temporaries, 2) == [True] * 2


def test_two_groups_work_in_two_threads(mpi, on_ranks):
    assert on_ranks(mpi, programs.two_groups, 2) == [[200.0, 200.0]] * 2


def test_groups_that_were_closed_or_dropped_leave_room_for_others(mpich, on_ranks):
    assert on_ranks(mpich, programs.many_groups, 2) == [2] * 2


def test_a_rank_that_waits_at_once_meets_one_that_waits_later(mpi, on_ranks):
    assert on_ranks(mpi, programs.mixed, 2) == [[2.0, 2.0]] * 2


def test_ended_ranks_are_found_in_several_threads_at_once(mpich, on_ranks):
    assert on_ranks(mpich, programs.polls_in_threads, 2) == [[], []]


def test_an_algorithm_of_the_users_runs_beside_native_collectives(mpich):
    options = {"algorithms": {"all_reduce": "ring"}}
    results = mpich.results(programs.fixed, 3, init_options=options)
    assert results == [[[0.0, 3.0, 6.0, 9.0, 12.0], [0, 1, 2]]] * 3


def test_ranks_that_share_no_memory_agree_by_messages(mpi, on_ranks):
    assert on_ranks(mpi, programs.by_messages, 3) == [[True] * 4] * 3


@pytest.mark.parametrize("count", [3, 100_000], ids=["at once", "in blocks"])
def test_a_function_that_raises_ends_the_group_not_the_job(mpi, on_ranks, count):
    found = on_ranks(mpi, programs.failing_function, 2, count)
    assert ["ArithmeticError", "not these numbers"] in found  # the program's own where it was raised
    for kind, text in found:
        assert kind == "ArithmeticError" or (kind == "GroupClosed" and "ArithmeticError: not these numbers" in text)
