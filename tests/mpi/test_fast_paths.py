"""Fast paths meet ordinary calls, and persistent operations keep to the rules of ordinary ones."""

from __future__ import annotations

import pytest

from . import fast_path_programs as programs

COUNTS = [3, 5000, 100_000]  # numbers that fit into a line of the shared memory, into a slot, and into neither


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_on_the_fast_path_meet_ranks_on_the_ordinary_one(mpi, on_ranks, world_size):
    assert on_ranks(mpi, programs.mixed_paths, world_size) == [[]] * world_size


@pytest.mark.parametrize("count", COUNTS)
def test_started_steps_and_other_collectives_run_in_order(mpi, on_ranks, count):
    assert on_ranks(mpi, programs.steps_and_others, 2, count) == [[True] * 12] * 2


@pytest.mark.parametrize("count", COUNTS)
def test_a_step_that_one_rank_leaves_out_is_found(mpi, on_ranks, count):
    assert on_ranks(mpi, programs.skip_a_step, 3, count) == [True] * 3


def test_a_rank_that_comes_late_to_a_step_does_not_go_on_alone(mpich, on_ranks):
    expected = {f"{count}, started={started}": "CollectiveTimeout" for count in COUNTS for started in (False, True)}
    assert on_ranks(mpich, programs.late_steps, 2, COUNTS) == [[expected, 2]] * 2


def test_an_exchange_with_neighbours_frees_its_requests(mpi, on_ranks):
    assert on_ranks(mpi, programs.halo, 3) == [True] * 3


def test_a_step_of_an_exchange_ends_at_its_deadline(mpi, on_ranks):
    (text, total), (away, _) = on_ranks(mpi, programs.lonely_halo, 2)
    assert "0.3 s" in text
    assert (away, total) == ("away", 2)


def test_an_interrupt_on_the_fast_path_holds_no_other_rank(mpi, on_ranks):
    (first, total), (second, _) = on_ranks(mpi, programs.interrupted, 2)
    assert (first, total) == ("interrupted", 2)
    assert second == (2.0 if mpi.name == "openmpi" else "closed")
