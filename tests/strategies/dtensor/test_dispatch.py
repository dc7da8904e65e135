"""NumPy functions that DTensors do not support raise an error that names the alternatives."""

from __future__ import annotations

import numpy as np
import pytest

from ferro import UnsupportedError
from ferro_strategies.dtensor import Shard

from .arrays_on_mesh import on_mesh, random_dtensor

S0 = Shard(0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: np.unique(x),
        lambda x: np.linalg.svd(x),
        lambda x: np.linalg.norm(x, 2),
        lambda x: np.where(x > 0),
        lambda x: np.save("x.npy", x),
        lambda x: np.sum(x, out=np.zeros(2)),
        lambda x: np.add(x, x, where=np.ones((4, 2), bool)),
        lambda x: np.add.reduceat(x, [0, 1]),
        lambda x: np.matmul(x, x.T, out=x),
        lambda x: np.logical_or.reduce(x, initial=True),
    ],
)
def test_unsupported_calls_name_the_alternatives(call):
    def check(mesh):
        x, _ = random_dtensor(mesh, [S0], (4, 2))
        with pytest.raises(UnsupportedError, match=r"full_tensor\(\)"):
            call(x)

    on_mesh((2,), check)
