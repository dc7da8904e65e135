"""Scatters with their headers: one call of the native helper meets ranks that broadcast and scatter one by one."""

import time

import numpy as np
import pytest

import ferro
from ferro_gloo.shm.native import ABSENT, NATIVE
from ferro_testing import run_ranks

DEADLINE_S = 60
COLUMNS = (1, 5, 3000, 50_000)  # blocks in a line, in a slot, and in chunks


def scatter_all_kinds(group):
    """Scatter arrays of kinds that come again, in ways that each rank chooses for itself."""
    rng, n, me = np.random.default_rng(7), group.world_size, group.rank
    for turn in range(150):
        root, columns, rows = int(rng.integers(n)), int(rng.choice(COLUMNS, p=[0.4, 0.4, 0.1, 0.1])), 1 + turn % 2
        sizes = rng.integers(0, 4, n).tolist() if rng.random() < 0.15 else None
        many_axes = (1,) * 20 if rng.random() < 0.1 else ()  # the header takes a second message
        gives_out, is_asynchronous, is_list = rng.random((3, n)) < [[0.5], [0.1], [0.1]]
        whole = np.arange((sum(sizes) if sizes else rows * n) * columns, dtype=rng.choice(["f4", "i8"])) + turn
        whole = whole.reshape(-1, columns, *many_axes)
        expected = np.split(whole, np.cumsum(sizes or [rows] * n)[:-1])[me]
        out = np.empty_like(expected) if gives_out[me] else None
        x = None if me != root else np.repeat(whole, 2, axis=1)[:, ::2] if is_list[me] else whole
        block = group.scatter(x, root, sizes=sizes if me == root else None, out=out, async_op=bool(is_asynchronous[me]))
        block = block.wait() if is_asynchronous[me] else block
        np.testing.assert_array_equal(block, expected, strict=True)
        assert out is None or block is out
        assert group.all_reduce(np.float32(me)) == n * (n - 1) / 2
    return True


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_each_rank_scatters_in_its_own_way(ranks):
    assert run_ranks(scatter_all_kinds, ranks, backend="gloo", timeout_s=DEADLINE_S) == [True] * ranks


def scatter_quickly(group):
    """Learn a scatter; then run it with a late root, with a late rank, and with an array that does not fit."""
    n, me = group.world_size, group.rank
    x, out = np.arange(2.0 * n), np.empty(2)
    call = (x if me == 0 else None), 0
    for _ in range(3):
        group.scatter(*call, out=out)
    path = group._fast_calls._calls["scatter", x.dtype, x.shape if me == 0 else out.shape, None, 0].__self__._path
    found = [type(path).__name__]
    for late in (0, 1):
        if me == late:
            time.sleep(0.3)
        out[:] = -1
        assert group.scatter(*call, out=out) is out
        assert out.tolist() == [2.0 * me, 2.0 * me + 1]
    try:
        group.scatter(*call, out=np.empty(3) if me == 1 else out)
        found.append(out.tolist())
    except ferro.UsageError as error:
        found.append(str(error))
    except ferro.CollectiveMismatch as error:  # the root was late, so this rank awaited rank 1 as well
        return [*found, None, str(error)]
    try:
        group.barrier()
    except ferro.CollectiveMismatch as error:
        found.append(str(error))
    return found


@pytest.mark.skipif(NATIVE is None, reason=ABSENT)
def test_a_scatter_is_one_call_and_waits_for_late_ranks_and_refuses_an_array_of_another_shape():
    found = run_ranks(scatter_quickly, 3, backend="gloo", timeout_s=DEADLINE_S)
    assert [result[0] for result in found] == ["AnnouncedScatter"] * 3
    assert found[0][1] in ([0.0, 1.0], None)
    assert found[2][1] in ([4.0, 5.0], None)
    assert "shape" in found[1][1]
    assert len({result[2] for result in found}) == 1, "every rank is told in the same words"


def lose_a_rank(group):
    """Leave in the middle of a stream of scatters."""
    x, out = np.arange(2.0 * group.world_size), np.empty(2)
    try:
        for turn in range(1000):
            if group.rank == 1 and turn == 100:
                return "left"
            group.scatter(x if group.rank == 0 else None, out=out)
    except ferro.FerroError as error:
        return type(error).__name__, error.peer
    return "completed"


def test_a_rank_that_leaves_is_found():
    found = run_ranks(lose_a_rank, 3, backend="gloo", timeout_s=DEADLINE_S)
    assert found[1] == "left"
    assert found[0] == found[2] == ("PeerLost", 1) or found[0] == found[2] == ["PeerLost", 1]


def go_on_without_a_block(group):
    """Repeat a scatter and an all_reduce; in the end a rank refuses its block, and goes on, as the others do."""
    n, me = group.world_size, group.rank
    x, turns = np.arange(n), 7
    for turn in range(turns):
        refuses = turn == turns - 1 and me == n - 1
        try:
            group.scatter(x if me == 1 else None, 1, out=np.empty(2 if refuses else 1, x.dtype))
        except ferro.UsageError:
            assert refuses
        try:
            # Rank 0 calls in another way than the rest, who take what it has reduced.
            total = group.all_reduce(np.full(3, turn), timeout_s=DEADLINE_S if me == 0 else None)
        except ferro.CollectiveMismatch:
            return "found"
        assert total.tolist() == [n * turn] * 3
    return "not found"


def test_a_rank_that_refuses_its_block_gives_no_older_array_to_the_next_operation():
    """In two rounds a rank publishes two chunks at once; the others await only the second after a quick scatter."""
    assert run_ranks(go_on_without_a_block, 5, backend="gloo", timeout_s=DEADLINE_S) == ["found"] * 5
