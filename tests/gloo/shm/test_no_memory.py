"""Where shared memory is small or cannot be had: results are right, and the user is told why.

Each test runs this file as a program in a mount namespace of its own, with another /dev/shm.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ferro_testing import run_ranks_outcomes

CANNOT = "mount namespaces need root and util-linux"
MIB = 1 << 20


@functools.cache
def can_unshare():
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    trial = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return subprocess.run(trial, capture_output=True, timeout=10).returncode == 0


pytestmark = pytest.mark.skipif(not can_unshare(), reason=CANNOT)


def ranks_with(mount, name, ranks=3):
    """Run a function of this file on ranks that have another /dev/shm; return their reports."""
    inner = f'mount {mount} /dev/shm && exec "$0" "$@"'
    command = ["unshare", "--mount", "sh", "-c", inner]
    command += [sys.executable, __file__, name, str(ranks)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert all(rank["ok"] for rank in told), told
    return told


def run(name, ranks):
    outcomes = run_ranks_outcomes(globals()[name], int(ranks), backend="gloo", timeout_s=30)
    told = [{"ok": o.ok, "result": o.result, "output": o.output, "all": o.describe()} for o in outcomes]
    print(json.dumps(told))


def warnings_in(told):
    return [line for rank in told for line in rank["output"].splitlines() if line]


# -- on the ranks ---------------------------------------------------------------------------------


def reduce_all_kinds(group):
    """Return the sums of arrays, ordinary and from `empty`, small and large."""
    sums = []
    for size in (3, 300_000):
        x = group.empty(size, np.float32)
        x[...] = group.rank + 1
        sums += [float(group.all_reduce(x)[-1]), float(group.all_reduce(x, out=x)[-1])]
    return sums


def use_two_groups(group):
    pair = group.subgroup([0, 1]) if group.rank < 2 else None
    sums = reduce_all_kinds(group)
    return [sums, reduce_all_kinds(pair) if pair else []]


def run_out_of_memory(group):
    """Take arrays until there are no more, some ranks sooner than others."""
    kept, sums = [], []
    for number in range(8):
        x = group.empty(3 * MIB // 4, np.float32)
        x[...] = group.rank + number
        sums.append(float(group.all_reduce(x, out=x)[-1]))
        if group.rank != 1:
            kept.append(x)
    return sums


def on_one_host(group):
    """Return the backend of the collectives; see that it works."""
    assert reduce_all_kinds(group) == [6.0] * 4
    return type(group._backend._collectives).__name__


# -- the tests ------------------------------------------------------------------------------------


def test_too_little_for_a_group_means_tcp_and_a_warning_for_each_group():
    told = ranks_with("-t tmpfs -o size=1m tmpfs", "use_two_groups")
    expected = [[6.0] * 4, [3.0] * 4]
    assert [rank["result"] for rank in told] == [expected, expected, [[6.0] * 4, []]]
    text = warnings_in(told)
    regions = [line for line in text if "for each group" in line]
    assert len(regions) == 2, text
    assert all("collectives go over TCP" in line for line in regions)
    assert all("--shm-size" in line for line in text)


@pytest.mark.parametrize("mount", ["-t tmpfs -o ro tmpfs", "-t proc proc"], ids=["ro", "no tmpfs"])
def test_no_shared_memory_means_tcp_and_one_warning(mount):
    told = ranks_with(mount, "use_two_groups")
    expected = [[6.0] * 4, [3.0] * 4]
    assert [rank["result"] for rank in told] == [expected, expected, [[6.0] * 4, []]]
    (line,) = warnings_in(told)
    assert "can share no memory" in line
    assert "give it a tmpfs with room at /dev/shm" in line
    assert "collectives go over TCP" in line


def test_arrays_are_ordinary_ones_when_memory_has_run_out():
    told = ranks_with("-t tmpfs -o size=24m tmpfs", "run_out_of_memory")
    sums = [3.0 + 3 * number for number in range(8)]
    assert [rank["result"] for rank in told] == [sums] * 3
    text = warnings_in(told)
    assert all("group.empty has no shared memory left" in line for line in text), text
    assert 2 <= len(text) <= 3, "one for each rank that kept arrays, and perhaps the other"


def test_a_tmpfs_without_a_bound_is_not_a_full_one():
    told = ranks_with("-t tmpfs -o size=0 tmpfs", "on_one_host")
    assert [rank["result"] for rank in told] == ["ShmBackend"] * 3
    assert warnings_in(told) == []


if __name__ == "__main__":
    run(*sys.argv[1:])
