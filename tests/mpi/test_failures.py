"""Failed calls end by their deadline with an error, and MPI is finalized all the same."""

from __future__ import annotations

import pytest

from ferro import UsageError

from . import programs


def test_a_rank_that_stays_away_is_named_also_without_shared_memory(mpich):
    text, away = mpich.results(programs.late_by_messages, 2)
    assert "did not finish within 0.3 s" in text
    assert away == "away"


def test_a_member_that_makes_no_group_is_told(mpich):
    text, away = mpich.results(programs.absent_member, 2)
    assert "not all members came" in text
    assert away == "away"


def test_with_ulfm_a_peer_that_dies_is_lost_to_the_receiver_of_its_message(openmpi):
    survivor, victim = openmpi.with_options("--with-ft", "ulfm").outcomes(programs.lose_while_sending, 2)
    assert not victim.ok
    assert survivor.result == 1, survivor.describe()


def test_a_peer_that_left_is_lost_once_its_messages_have_come(mpi):
    assert mpi.results(programs.leave, 2) == [True, True]


def test_with_ulfm_the_survivors_shrink_twice(openmpi):
    outcomes = openmpi.with_options("--with-ft", "ulfm").outcomes(programs.shrink_twice, 4)
    assert [outcome.result for outcome in outcomes[:2]] == [[3, 3, 2, 2]] * 2, outcomes
    assert not any(outcome.ok for outcome in outcomes[2:])


def test_there_are_no_options(mpich):
    outcomes = mpich.outcomes(programs.fixed, 1, init_options={"backend_options": {"fast": True}})
    assert outcomes[0].error_type == UsageError.__name__
    assert "mpi has no options: fast" in outcomes[0].error_text


@pytest.mark.parametrize("how", ["timeout", "abort"])
def test_a_late_rank_does_not_go_on_alone(mpi, how):
    expected = "CollectiveTimeout" if how == "timeout" else "GroupClosed"
    for count in (3, 100_000):  # shared operands, and MPI's own collective
        assert mpi.results(programs.late, 2, count, how) == [[expected, 2]] * 2


def test_an_interrupt_just_before_mpis_collective_holds_no_other_rank(mpi):
    (first, total), (second, _) = mpi.results(programs.interrupted, 2)
    assert (first, total) == ("nothing", 2)
    assert second == (2.0 if mpi.name == "openmpi" else "closed")


def test_with_ulfm_the_survivors_shrink_without_a_late_rank(openmpi):
    outcomes = openmpi.with_options("--with-ft", "ulfm").outcomes(programs.shrink_without_a_late_rank, 4)
    assert [outcomes[rank].result for rank in (0, 2, 3)] == [2, 2, True], outcomes


ONE_RAISES = """
import time
import ferro
group = ferro.init()
group.barrier()
if group.rank == 1:
    raise LookupError("the first cause")
while True:
    group.all_reduce(1)
"""


def test_an_uncaught_exception_ends_the_job_and_is_shown(mpi, tmp_path):
    (tmp_path / "program.py").write_text(ONE_RAISES)
    ended = mpi.program(2, tmp_path / "program.py")
    assert ended.returncode != 0
    assert 'raise LookupError("the first cause")' in ended.stderr


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_program_that_ends_well_has_exit_status_0(mpi, tmp_path, world_size):
    (tmp_path / "program.py").write_text("import ferro\nprint(ferro.init().all_reduce(1))\n")
    ended = mpi.program(world_size, tmp_path / "program.py")
    assert (ended.returncode, ended.stderr) == (0, "")
    # mpiexec may run the lines of two ranks together.
    assert "".join(ended.stdout.split()) == str(world_size) * world_size


ONE_IS_STUCK = """
import atexit, time
atexit.register(lambda: print("the last handler", flush=True))
import numpy as np
import ferro
group = ferro.init(timeout_s=1)
from ferro_mpi import library
library._EXCEPTION_S = 0.5
group.barrier()
if group.rank == 1:
    time.sleep(600)
group.all_reduce(np.ones(3))
"""


def test_a_failed_rank_ends_although_another_is_stuck(mpi, tmp_path):
    (tmp_path / "program.py").write_text(ONE_IS_STUCK)
    ended = mpi.program(2, tmp_path / "program.py")
    assert ended.returncode != 0
    assert "rank 1 has not ended 0.5 s after a failure here" in ended.stderr
    assert "the last handler" in ended.stdout


ONE_SAVES = """
import time
import numpy as np
import ferro
group = ferro.init()
group.barrier()
if group.rank == 1:
    time.sleep(0.5)
try:
    group.all_reduce(np.ones(3), timeout_s=0.1 if group.rank == 0 else None)
except ferro.CollectiveTimeout:
    pass
if group.rank == 0:
    memory = group.backend._communicator.memory
    while memory.awaited_ranks():
        time.sleep(0.01)
    time.sleep(0.2)
    print("saved", flush=True)
"""


def test_a_rank_that_is_done_after_a_failure_waits_for_one_that_saves(mpi, tmp_path):
    (tmp_path / "program.py").write_text(ONE_SAVES)
    ended = mpi.program(2, tmp_path / "program.py")
    assert (ended.returncode, ended.stdout.strip()) == (0, "saved"), ended.stderr
