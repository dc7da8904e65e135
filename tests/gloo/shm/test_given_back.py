"""A world that died gives its shared memory back when it is closed, although its errors are kept."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import ferro
from ferro_gloo.shm import bootstrap
from ferro_gloo.shm.mapping import Mapping
from ferro_gloo.shm.segment import SHM_DIRECTORY, ShmSegment
from ferro_testing import run_ranks_outcomes


def held():
    """List the mappings and descriptors of shared memory that this process has."""
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(SHM_DIRECTORY) in line]
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the descriptor of the directory itself
            continue
    return mapped + [path for path in paths if path.startswith(str(SHM_DIRECTORY))]


def all_reduce_on_and_on(group, x):
    while True:
        group.all_reduce(x, out=x)


def end(group, how):
    """End the group by a failure; return the error."""
    x = np.ones(300_000)
    if how == "abort" and group.rank == 0:
        group.abort()
    if how == "death" and group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "timeout" and group.rank == 1:
        group._dispatcher._info.store.get("failure/verdict", deadline=float("inf"))
    if how == "mismatch" and group.rank == 1:
        x = x[1:]
    with pytest.raises(ferro.FerroError) as caught:
        all_reduce_on_and_on(group, x)
    return caught.value


def die_and_close(group, how, hosts):
    gc.disable()
    part = group.subgroup(range(group.world_size))
    mine = group.empty(100_000)
    for each in (group, part):
        mine[...] = 1
        each.all_reduce(mine, out=mine)
    before = held()
    errors = [end(each, how) for each in ((group,) if how in ("death", "timeout") else (part, group))]
    dropped = group.empty(100_000)
    del part, dropped
    group.close()
    with_array, last = held(), float(mine[-1])
    del mine
    return [len(before) > 2, len(with_array), last, held(), [type(error).__name__ for error in errors]]


def fork_children(group):
    """Return what a child has with and without an array that it shares with its parent."""
    x = group.empty(100_000)
    x[...] = 1
    group.all_reduce(x, out=x)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        found = [len(held()), float(x[-1])]
        del x
        os.write(theirs, repr([*found, len(held())]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(ours, 1000).decode(), float(group.all_reduce(x, out=x)[-1])


def test_a_forked_child_keeps_only_the_arrays():
    outcomes = run_ranks_outcomes(fork_children, 3, backend="gloo", timeout_s=60)
    assert [outcome.result for outcome in outcomes] == [["[1, 3.0, 0]", 9.0]] * 3, [o.describe() for o in outcomes]


@pytest.mark.parametrize(("how", "hosts"), [("abort", ""), ("death", "aab"), ("timeout", ""), ("mismatch", "aab")])
def test_closing_gives_all_back_but_the_users_arrays(how, hosts):
    outcomes = run_ranks_outcomes(
        die_and_close,
        3,
        backend="gloo",
        args=(how, hosts),
        timeout_s=60,
        env=lambda rank: {"FERRO_HOST_ID": hosts[rank] if hosts else ""},
        init_options={"timeout_s": 2.0 if how == "timeout" else 30.0},
    )
    sharing = [0, 1] if hosts else [0, 1, 2]
    for rank in sharing[:1] if how == "death" else sharing:
        assert outcomes[rank].ok, outcomes[rank].describe()
        shared, kept, last, rest, errors = outcomes[rank].result
        assert shared, "ranks that share no memory prove nothing"
        assert kept == 1, "the arena of this rank's array, and no descriptor"
        assert last == float(len(sharing)) if hosts == "" else last > 0
        assert rest == [], errors


def test_an_init_that_fails_half_way_gives_all_back(start_ranks, monkeypatch):
    before = held()
    failed = []

    def fail(*arguments, **options):
        raise OSError("no more")

    monkeypatch.setattr(bootstrap, "ShmRegion", fail)
    monkeypatch.setattr(bootstrap, "is_used_by_other_threads", lambda: False)  # the other rank's, which fails as well
    ranks = start_ranks(2)
    gc.disable()
    try:
        ranks.start(failed.append)
        ranks.join()
        assert sorted(ranks.errors) == [0, 1]
        assert held() == before
    finally:
        gc.enable()


def test_views_outlive_what_is_given_back():
    segment = ShmSegment.create(1 << 16)
    segment.reserve(0, 1 << 16)
    other = ShmSegment.open(segment.expose(), 1 << 16)
    view = np.frombuffer(segment.memory, np.uint8)
    view[...] = 7
    segment.close()
    segment.close()
    assert not view.any()
    view[...] = 3
    assert other.memory[100] == 7


def test_a_system_that_refuses_leaves_the_memory_as_it_is(monkeypatch):
    segment = ShmSegment.create(1 << 16)
    segment.reserve(0, 1 << 16)
    segment.memory[5] = 7

    def refuse(*arguments):
        raise OSError("no more address space")

    monkeypatch.setattr("ferro_gloo.shm.mapping._map", refuse)
    segment.close()
    assert segment.memory[5] == 7
    with pytest.raises(OSError, match="no more"):
        Mapping(0, 4096)
