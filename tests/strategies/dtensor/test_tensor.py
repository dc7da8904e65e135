"""Conversions and attributes of DTensors."""

from __future__ import annotations

import numpy as np
import pytest

from ferro import UnsupportedError, UsageError
from ferro_strategies.dtensor import Partial, Replicate, Shard

from .arrays_on_mesh import error_on_every_rank, on_mesh, random_dtensor

R, S0, P = Replicate(), Shard(0), Partial()


def test_a_dtensor_becomes_an_array_only_when_asked():
    for message in error_on_every_rank(
        (2,), lambda mesh: np.asarray(random_dtensor(mesh, [S0], (4,))[0]), UnsupportedError
    ):
        assert "full_tensor()" in message


def test_one_element_becomes_a_number():
    def check(mesh):
        x, whole = random_dtensor(mesh, [P], (1, 1))
        assert (float(x), int(x), complex(x)) == (whole.item(),) * 3
        assert bool(x) == bool(whole.item())
        many, _ = random_dtensor(mesh, [S0], (4,))
        total = many.sum()
        assert total.placements == (P,)
        assert float(total) == many.full_tensor().sum()
        with pytest.raises(UsageError, match="4 elements, not one"):
            float(many)

    on_mesh((2,), check)


def test_attributes_and_repr():
    def check(mesh):
        x, _ = random_dtensor(mesh, [S0, R], (6, 2))
        assert (x.ndim, x.size, len(x), x.mesh) == (2, 12, 6, mesh)
        with pytest.raises(TypeError, match="len"):
            len(x.sum())
        with pytest.raises(TypeError, match="unhashable"):
            hash(x)
        return repr(x)

    assert set(on_mesh((2, 1), check)) == {
        "DTensor(shape=(6, 2), dtype=float64, placements=(Shard(0), Replicate()), mesh={'dp': 2, 'tp': 1})"
    }
