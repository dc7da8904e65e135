"""The modules at the ends of a region communicate as their table says."""

from functools import partial

import numpy as np
import pytest

from ferro_strategies import tensor_parallel as tp

from .models import RANKS, floats, simulate

REGIONS = {
    "CopyIn": (tp.CopyIn, "own", "sum"),
    "ReduceOut": (tp.ReduceOut, "sum", "own"),
    "GatherIn": (tp.GatherIn, "gather", "sum and split"),
    "ScatterOut": (tp.ScatterOut, "sum and split", "gather"),
    "SplitIn": (tp.SplitIn, "split", "gather"),
    "GatherOut": (tp.GatherOut, "gather", "split"),
}


def move(how, arrays, rank, dim):
    """Compute the array that a rank should get, from all ranks' arrays."""
    if how == "own":
        return arrays[rank]
    if how == "gather":
        return np.concatenate(arrays, axis=dim)
    whole = arrays[rank] if how == "split" else sum(arrays)
    return whole if how == "sum" else np.array_split(whole, len(arrays), axis=dim)[rank]


@RANKS
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize(("kind", "forward", "backward"), REGIONS.values(), ids=REGIONS)
def test_regions_communicate_as_their_table_says(ranks, dim, kind, forward, backward):
    if kind in (tp.CopyIn, tp.ReduceOut):
        make, sizes = kind, [5] * ranks
    else:
        make = partial(kind, dim=dim)
        shards = [len(own_shard) for own_shard in np.array_split(np.empty(5), ranks)]
        sizes = shards if forward == "gather" else [5] * ranks

    def shaped(sizes, seed):
        arrays = []
        for rank, size in enumerate(sizes):
            shape = [2, 3, 4]
            shape[dim] = size
            arrays.append(floats(*shape, seed=seed + rank))
        return arrays

    xs = shaped(sizes, 0)
    ys = [move(forward, xs, rank, dim) for rank in range(ranks)]
    grads = [floats(*y.shape, seed=10 + rank) for rank, y in enumerate(ys)]

    def run(group):
        y, pullback = make(group).vjp(xs[group.rank])
        return y, pullback(grads[group.rank])

    for rank, (y, grad_x) in enumerate(simulate(run, ranks)):
        np.testing.assert_allclose(y, ys[rank], rtol=1e-12)
        np.testing.assert_allclose(grad_x, move(backward, grads, rank, dim), rtol=1e-12)
