"""Nothing stays behind: however and whenever ranks end, the names of shared memory go.

Each test has a folder of its own for shared memory, since any other job removes the stale names in
/dev/shm. Ranks can be told to kill themselves in the moments in which segments are exposed.
"""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest

from ferro.errors import FerroError
from ferro_gloo.shm import segment
from ferro_gloo.shm.segment import ShmSegment
from ferro_testing import run_ranks_outcomes

FOLDER, MOMENT = "TEST_SHM_FOLDER", "TEST_SHM_MOMENT"


def killed_after(function, count):
    """Return a function after whose call number `count` the process is killed."""
    calls = 0

    def call(*args):
        nonlocal calls
        calls += 1
        result = function(*args)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


def set_up(name, moment):
    """Prepare this process, a rank: it has loaded this file and is about to join the others."""
    segment.SHM_DIRECTORY = Path(name)
    if moment:
        method, count = moment.split()
        if method == "open":
            ShmSegment.open = killed_after(ShmSegment.open, int(count))
        else:
            setattr(ShmSegment, method, killed_after(getattr(ShmSegment, method), int(count)))


if FOLDER in os.environ:
    set_up(os.environ[FOLDER], os.environ.get(MOMENT))


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def job(folder, function, *, moments=None, ranks=3, options=None):
    """Run ranks that use this folder, some of which are killed at a moment."""
    moments = moments or {}

    def variables(rank):
        return {FOLDER: str(folder), MOMENT: moments.get(rank, "")}

    return run_ranks_outcomes(
        function,
        ranks,
        backend="gloo",
        timeout_s=20,
        env=variables,
        init_options={"timeout_s": 5.0, "backend_options": options or {}},
    )


def work(group):
    """Use all kinds of shared memory; return the names that are there in the midst of it."""
    x = group.empty(100_000)
    x[...] = group.rank
    group.all_reduce(x, out=x)
    if group.rank < 2:
        group.subgroup(range(2)).all_reduce(x, out=x)
    group.barrier()
    found = names_in(segment.SHM_DIRECTORY)
    group.barrier()
    return found


def work_and_fail(group):
    work(group)
    raise ValueError("a bug of the program")


def work_and_be_killed(group, victims=(1,)):
    found = work(group)
    if group.rank in victims:
        os.kill(os.getpid(), signal.SIGKILL)
    x = group.empty(1_000_000)
    for _ in range(1000):
        group.all_reduce(x, out=x)
    return found


def work_and_all_be_killed(group):
    work_and_be_killed(group, range(group.world_size))


def work_and_be_killed_at_work(group):
    """Each is killed when it has done some more work, wherever it then is."""
    signal.setitimer(signal.ITIMER_REAL, 0.05 + 0.01 * group.rank)  # SIGALRM ends the process
    x = group.empty(1_000_000)
    while True:
        group.all_reduce(x, out=x)
        group.all_reduce(np.ones(100))


def assert_usable(folder):
    """The next job works, and leaves nothing, whatever the last one left."""
    outcomes = job(folder, work, ranks=2)
    assert [outcome.result for outcome in outcomes] == [[], []], [o.describe() for o in outcomes]
    assert names_in(folder) == []


def test_nothing_is_there_at_work_or_afterwards(folder):
    outcomes = job(folder, work)
    assert [outcome.result for outcome in outcomes] == [[]] * 3, [o.describe() for o in outcomes]
    assert names_in(folder) == []


@pytest.mark.parametrize(
    "function", [work_and_fail, work_and_be_killed, work_and_all_be_killed, work_and_be_killed_at_work]
)
def test_nothing_is_left_by_ranks_that_fail_or_are_killed(folder, function):
    outcomes = job(folder, function)
    assert not all(outcome.ok for outcome in outcomes)
    assert names_in(folder) == []


# The first segment that a rank exposes is its arena, the second, of rank 0, is the region of the
# world. Each rank opens two arenas, then that region.
@pytest.mark.parametrize(("victim", "moment"), [(2, "open 1"), (2, "unlink 1"), (1, "open 3"), (0, "reserve 1")])
def test_a_rank_killed_while_segments_are_exposed_leaves_nothing(folder, victim, moment):
    """The name of its own arena excepted: only the owner takes that away, or the next job."""
    outcomes = job(folder, work, moments={victim: moment})
    assert outcomes[victim].signal == "SIGKILL", outcomes[victim].describe()
    assert not any(outcome.ok for outcome in outcomes)
    assert len(names_in(folder)) == (moment == "open 1")
    assert_usable(folder)


@pytest.mark.parametrize(("victims", "moment"), [((0, 1, 2), "expose 1"), ((0,), "expose 2")])
def test_what_a_killed_rank_had_just_exposed_goes_with_the_next_job(folder, victims, moment):
    outcomes = job(folder, work, moments=dict.fromkeys(victims, moment))
    assert [outcomes[rank].signal for rank in victims] == ["SIGKILL"] * len(victims)
    assert names_in(folder) != [], "else this test is about nothing"
    assert_usable(folder)


def test_a_job_removes_no_name_that_another_job_is_exposing(folder):
    """A name is held as long as its owner lives, however long that takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "SHM_DIRECTORY", folder)
        exposed = ShmSegment.create(4096)
        name = f"ferro-gloo-{exposed.expose().hex()}"
        outcomes = job(folder, work)
        assert [outcome.result for outcome in outcomes] == [[name]] * 3
        exposed.unlink()


def stay_away(group):
    """Rank 2 does not come to a group's first collective, in which it maps its region."""
    part = group.subgroup(range(3))
    kind = "nothing"
    if group.rank != 2:
        try:
            part.all_reduce(np.ones(3), timeout_s=0.3)
        except FerroError as error:
            kind = type(error).__name__
    found = names_in(segment.SHM_DIRECTORY)
    group.barrier()
    return kind, found if group.rank != 2 else []


def test_a_region_that_nobody_opened_goes_at_once(folder):
    outcomes = job(folder, stay_away)
    told = ["CollectiveTimeout", []]
    assert [outcome.result for outcome in outcomes] == [told, told, ["nothing", []]], [
        outcome.describe() for outcome in outcomes
    ]


def make_and_close_groups(group):
    """Count the mapped segments after few and after many groups."""
    mapped = []
    for number in range(12):
        part = group.subgroup(range(group.world_size), name=f"part {number}")
        part.all_reduce(np.ones(100_000))
        part.close()
        del part
        maps = Path("/proc/self/maps").read_text().splitlines()
        mapped.append(sum(str(segment.SHM_DIRECTORY) in line for line in maps))
    return mapped


def test_the_memory_of_closed_groups_is_given_back(folder):
    for outcome in job(folder, make_and_close_groups):
        assert outcome.ok, outcome.describe()
        assert outcome.result[-1] <= outcome.result[2]
        assert outcome.result[-1] > 0, "nothing was shared"
