"""Failed calls end by their deadline with an error, and MPI is finalized all the same."""

from __future__ import annotations

from . import programs


def test_a_rank_that_stays_away_is_named_also_without_shared_memory(mpich, on_ranks):
    text, away = on_ranks(mpich, programs.late_by_messages, 2)
    assert "did not finish within 0.3 s" in text
    assert away == "away"


def test_a_member_that_makes_no_group_is_told(mpich, on_ranks):
    text, away = on_ranks(mpich, programs.absent_member, 2)
    assert "not all members came" in text
    assert away == "away"


def test_a_peer_that_left_is_lost_once_its_messages_have_come(mpi, on_ranks):
    assert on_ranks(mpi, programs.leave, 2) == [True, True]


def test_with_ulfm_the_survivors_shrink_twice(openmpi):
    outcomes = openmpi.with_options("--with-ft", "ulfm").outcomes(programs.shrink_twice, 4)
    assert [outcome.result for outcome in outcomes[:2]] == [[3, 3, 2, 2]] * 2, outcomes
    assert not any(outcome.ok for outcome in outcomes[2:])


def test_a_late_rank_does_not_go_on_alone(mpi, on_ranks):
    errors = {"timeout": "CollectiveTimeout", "abort": "GroupClosed"}
    expected = {f"{how} {count}": error for how, error in errors.items() for count in (3, 100_000)}
    assert on_ranks(mpi, programs.late, 2) == [[expected, 2]] * 2


def test_an_interrupt_just_before_mpis_collective_holds_no_other_rank(mpi, on_ranks):
    (first, total), (second, _) = on_ranks(mpi, programs.interrupted, 2)
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


ALONE = """
import ferro
try:
    ferro.init(backend_options={"fast": True})
except ferro.UsageError as error:
    assert "mpi has no options: fast" in str(error)
else:
    raise AssertionError("an unknown option was taken")
print(ferro.init().all_reduce(1))
"""


def test_a_rank_alone_has_no_options_and_ends_well(mpi, tmp_path):
    (tmp_path / "program.py").write_text(ALONE)
    ended = mpi.program(1, tmp_path / "program.py")
    assert (ended.returncode, ended.stderr, ended.stdout.strip()) == (0, "", "1")


ONE_IS_STUCK = """
import atexit, time
atexit.register(lambda: print("the last handler", flush=True))
import numpy as np
import ferro
group = ferro.init()
from ferro_mpi import library
library._EXCEPTION_S = 0.5
group.barrier()
if group.rank == 1:
    time.sleep(600)
group.all_reduce(np.ones(3), timeout_s=0.3)
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
