"""Conversions and attributes of DTensors."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from ferro import UnsupportedError, UsageError
from ferro_strategies import nn
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


def test_formats_copies_and_what_cannot_be_copied():
    def check(mesh):
        x, whole = random_dtensor(mesh, [S0], (5, 2))
        assert f"{x.mean():.3f} {x.sum():5.1f}" == f"{whole.mean():.3f} {whole.sum():5.1f}"
        assert f"{x.mean()}".startswith("DTensor(shape=()")  # which sends nothing, so that one rank may print it
        with pytest.raises(TypeError, match="for one element"):
            f"{x:.3f}"
        twin = copy.deepcopy({"x": x, "mesh": mesh})["x"]
        twin[...] = 0
        assert twin.mesh is mesh
        np.testing.assert_array_equal(x.full_tensor(), whole)
        for unpicklable in (x, mesh):
            with pytest.raises(UsageError, match="cannot be pickled"):
                pickle.dumps(unpicklable)
        with pytest.raises(UsageError, match=r"any\(\)"):
            bool(x)
        with pytest.raises(TypeError, match="without dims"):
            list(x.sum())
        assert whole[0, 0] in x
        assert 99 not in x
        assert (x.nbytes, x.itemsize) == (whole.nbytes, 8)

    on_mesh((2,), check)


def test_layers_and_parameters_refuse_dtensors():
    def check(mesh):
        x, _ = random_dtensor(mesh, [S0], (4, 3), dtype=np.float32)
        for call in (lambda: nn.Parameter(x), lambda: nn.Linear(3, 2, rng=0).vjp(x), lambda: nn.mse_loss(x, x)):
            with pytest.raises(UsageError, match=r"DTensor.*full_tensor\(\)"):
                call()

    on_mesh((2,), check)
