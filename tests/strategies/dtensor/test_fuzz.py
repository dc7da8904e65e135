"""Random expressions of DTensors equal NumPy's on the whole arrays, in every dtype, on meshes of one to three axes."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

from ferro import FerroError
from ferro_strategies.dtensor import DTensor, Partial, Replicate, Shard

from .arrays_on_mesh import on_mesh, random_dtensor

RUNS = int(os.environ.get("FERRO_FUZZ_RUNS", "12"))
FIRST_SEED = int(os.environ.get("FERRO_FUZZ_SEED", "0"))
MESHES = [(2,), (3,), (2, 2), (1, 2), (4,), (2, 3), (2, 1, 2), (2, 2, 2)]
DTYPES = [
    np.float64, np.float32, np.float16, np.int64, np.int8, np.uint8, np.bool_, np.complex128, np.complex64,
    ml_dtypes.bfloat16,
]  # fmt: skip
NEAR = {"float16": 1e-2, "bfloat16": 8e-2, "float32": 1e-4, "complex64": 1e-4}

# Functions of an array, another that broadcasts with it, an axis (None for all) and a random generator.
UNARY = [
    lambda x, axis, rng: x * 2,
    lambda x, axis, rng: -x,
    lambda x, axis, rng: 3 - x,
    lambda x, axis, rng: x / 2,
    lambda x, axis, rng: x**2,
    lambda x, axis, rng: 2.5 * x,
    lambda x, axis, rng: abs(x),
    lambda x, axis, rng: np.conjugate(x),
    lambda x, axis, rng: np.real(x),
    lambda x, axis, rng: np.clip(x, -1, 2),
    lambda x, axis, rng: np.clip(x, None, 1.5),
    lambda x, axis, rng: x > 0,
    lambda x, axis, rng: x.astype(np.float32),
    lambda x, axis, rng: x.astype(np.int64),
    lambda x, axis, rng: x.sum(axis=axis, keepdims=bool(rng.integers(2))),
    lambda x, axis, rng: np.sum(x, axis=axis, initial=2, where=x > 0),
    lambda x, axis, rng: x.mean(axis=axis),
    lambda x, axis, rng: np.mean(x, axis=axis, where=x < 3),
    lambda x, axis, rng: x.prod(axis=axis),
    lambda x, axis, rng: x.max(axis=axis),
    lambda x, axis, rng: x.min(axis=axis, initial=1),
    lambda x, axis, rng: np.ptp(x, axis=axis),
    lambda x, axis, rng: x.any(axis=axis),
    lambda x, axis, rng: x.all(axis=axis),
    lambda x, axis, rng: x.var(axis=axis, ddof=int(rng.integers(2))),
    lambda x, axis, rng: x.std(axis=axis, keepdims=bool(rng.integers(2))),
    lambda x, axis, rng: np.linalg.norm(x, axis=axis, ord=None if axis is None else [2, 1, np.inf, 3][rng.integers(4)]),
    lambda x, axis, rng: np.count_nonzero(x, axis=axis, keepdims=True),
    lambda x, axis, rng: np.nansum(np.where(x > 1, np.nan, x), axis=axis),
    lambda x, axis, rng: np.nanmax(np.where(x > 1, np.nan, x), axis=axis),
    lambda x, axis, rng: np.nanmean(np.where(x > 2, np.nan, x), axis=axis),
    lambda x, axis, rng: np.argmax(x, axis=axis),
    lambda x, axis, rng: np.argmin(x, axis=axis, keepdims=True),
    lambda x, axis, rng: np.cumsum(x, axis=axis),
    lambda x, axis, rng: np.sort(x, axis=axis),
    lambda x, axis, rng: np.take_along_axis(x, np.argsort(x, axis=axis, kind="stable"), axis),
    lambda x, axis, rng: np.median(x, axis=axis),
    lambda x, axis, rng: np.percentile(x, [20, 50], axis=axis),
    lambda x, axis, rng: np.add.accumulate(x, axis=axis or 0),
    lambda x, axis, rng: np.subtract.reduce(x, axis=axis or 0),
    lambda x, axis, rng: np.flip(x, axis),
    lambda x, axis, rng: np.roll(x, 1, axis),
    lambda x, axis, rng: np.diff(x, axis=axis or 0),
    lambda x, axis, rng: np.take(x, [0, -1, 0], axis),
    lambda x, axis, rng: np.repeat(x, 2, axis),
    lambda x, axis, rng: np.tile(x, (2, 1)),
    lambda x, axis, rng: np.split(x, [1], axis or 0)[0],
    lambda x, axis, rng: np.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1)),
    lambda x, axis, rng: np.transpose(x, rng.permutation(x.ndim)),
    lambda x, axis, rng: np.moveaxis(x, 0, -1),
    lambda x, axis, rng: x.ravel(),
    lambda x, axis, rng: x.reshape(x.shape[0], -1),
    lambda x, axis, rng: x.squeeze(),
    lambda x, axis, rng: np.expand_dims(x, axis or 0),
    lambda x, axis, rng: np.broadcast_to(x, (2, *x.shape)),
    lambda x, axis, rng: x[..., None],
    lambda x, axis, rng: x[0],
    lambda x, axis, rng: x[..., 0],
    lambda x, axis, rng: x[..., [0, 0]],
    lambda x, axis, rng: x[[True] + [False] * (x.shape[0] - 1)],
    lambda x, axis, rng: np.trace(x),
    lambda x, axis, rng: np.tril(x),
    lambda x, axis, rng: np.round(x / 3, 1),
    lambda x, axis, rng: np.nan_to_num(x),
    lambda x, axis, rng: written(x, lambda y: np.copyto(y, 1, where=y > 0)),
    lambda x, axis, rng: written(x, lambda y: y.__setitem__(y > 0, 2)),
    lambda x, axis, rng: written(x, lambda y: y.__setitem__(..., 1.5)),
    lambda x, axis, rng: np.zeros_like(x) + np.full_like(x, 3),
]
BINARY = [
    lambda x, y, axis, rng: x + y,
    lambda x, y, axis, rng: x - y,
    lambda x, y, axis, rng: x * y,
    lambda x, y, axis, rng: x / (abs(y) + 1),
    lambda x, y, axis, rng: x // (abs(y) + 1),
    lambda x, y, axis, rng: np.maximum(x, y),
    lambda x, y, axis, rng: np.minimum(x, y),
    lambda x, y, axis, rng: x == y,
    lambda x, y, axis, rng: np.where(x > y, x, y),
    lambda x, y, axis, rng: np.clip(x, y, y + 2),
    lambda x, y, axis, rng: np.isclose(x, y),
    lambda x, y, axis, rng: np.allclose(x, y),
    lambda x, y, axis, rng: np.array_equal(x, y),
    lambda x, y, axis, rng: np.concatenate([x, y], axis),
    lambda x, y, axis, rng: np.stack([x, y], axis or 0),
    lambda x, y, axis, rng: np.average(x, axis, abs(y) + 1),
    lambda x, y, axis, rng: np.vdot(x, y),
    lambda x, y, axis, rng: np.inner(x, y),
    lambda x, y, axis, rng: np.dot(x, np.transpose(y)),
    lambda x, y, axis, rng: x @ np.transpose(y),
    lambda x, y, axis, rng: np.tensordot(x, y, (0, 0)),
    lambda x, y, axis, rng: np.outer(x, y),
    lambda x, y, axis, rng: np.einsum("i...,i...->...", x, y),
    lambda x, y, axis, rng: np.einsum("ij,kj->ki", x, y),
    lambda x, y, axis, rng: np.multiply.outer(x, y),
    lambda x, y, axis, rng: written(x, lambda z: z.__setitem__(..., y)),
    lambda x, y, axis, rng: np.add(x, y, out=np.ones_like(x), where=x > 0),
]


def written(x, write):
    """Return a copy of an array in which `write` has written."""
    copy = x.copy()
    write(copy)
    return copy


def random_placements(rng, mesh, ndim, kind):
    op = ["sum", "sum", "prod", "max", "min"][rng.integers(3 if kind == "c" else 5)]
    choices = [Replicate(), Partial(op), *(Shard(dim) for dim in range(ndim))]
    return tuple(choices[rng.integers(len(choices))] for _ in mesh.shape)


def outcome(function, arrays, axis, seed):
    """Return a function's result, or the error that it raises."""
    try:
        with np.errstate(all="ignore"):
            return function(*arrays, axis, np.random.default_rng(seed))
    except Exception as error:  # noqa: BLE001 - compared below
        return error


def compare(found, expected, log):
    if isinstance(expected, bool):
        assert found is expected, log
        return
    assert found.shape == expected.shape, log
    if found.dtype.name != "bfloat16":  # of which NumPy's products are float32 and its norms float64
        assert found.dtype == expected.dtype, (found.dtype, expected.dtype, log)
    whole = found.full_tensor()
    near = max(NEAR.get(found.dtype.name, 1e-9), max(NEAR.get(one, 0) for one in log[0]))
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    np.testing.assert_allclose(
        whole.astype(wide), expected.astype(wide), rtol=near, atol=near * 4, equal_nan=True, err_msg=str(log)
    )


def trial(mesh, seed):
    """Apply random operations one after the other; return how many were compared, and how many ferro refused."""
    rng = np.random.default_rng(seed)
    compared, refused = 0, 0
    for _ in range(3):
        dtype = np.dtype(DTYPES[rng.integers(len(DTYPES))])
        shape = tuple(rng.integers(0 if rng.random() < 0.1 else 1, 6, rng.integers(0, 4)).tolist())
        x, whole = random_dtensor(mesh, random_placements(rng, mesh, len(shape), dtype.kind), shape, seed, dtype)
        log = [[dtype.name], mesh.shape, shape, x.placements]
        if dtype.kind in "fV" and rng.random() < 0.15:
            special = [np.nan, np.inf, -np.inf][rng.integers(3)]
            log.append(f"{special} where the array is 1")
            x, whole = np.where(x == 1, special, x), np.where(whole == 1, special, whole)
            x = x.redistribute(random_placements(rng, mesh, x.ndim, dtype.kind))
        for _ in range(4):
            axis = int(rng.integers(-whole.ndim, whole.ndim)) if whole.ndim and rng.random() < 0.8 else None
            operation, choice = rng.integers(len(UNARY) + len(BINARY)), rng.integers(2**32)
            log.append(f"axis {axis}")
            if operation < len(UNARY):
                function, operands = UNARY[operation], [(x, whole)]
            else:
                function = BINARY[operation - len(UNARY)]
                mixed = rng.random() < 0.4 and whole.dtype.name != "bfloat16"
                kind = whole.dtype if not mixed else np.dtype(DTYPES[rng.integers(len(DTYPES) - 1)])
                sizes = tuple(1 if rng.random() < 0.2 else size for size in whole.shape)
                placements = random_placements(rng, mesh, len(sizes), kind.kind)
                operands = [(x, whole), random_dtensor(mesh, placements, sizes, choice, kind)]
                log += [kind.name, sizes, placements]
                log[0].append(kind.name)
            code = function.__code__
            log.append(f"{code.co_firstlineno} {code.co_names}")
            if np.nanmax(np.abs(np.nan_to_num(whole.astype(complex), posinf=0, neginf=0)), initial=0) > 100:
                break
            expected = outcome(function, [one for _, one in operands], axis, choice)
            found = outcome(function, [one for one, _ in operands], axis, choice)
            if isinstance(expected, Exception) and any(one.dtype.name == "bfloat16" for _, one in operands):
                # NumPy has no products of bfloat16 matrices.
                wide = [one.astype(np.float32) if one.dtype.name == "bfloat16" else one for _, one in operands]
                expected = outcome(function, wide, axis, choice)
                if getattr(expected, "dtype", None) == np.float32:
                    expected = expected.astype(ml_dtypes.bfloat16)
            if isinstance(expected, Exception):
                assert isinstance(found, Exception), (log, expected, found)
                break
            if isinstance(found, Exception):
                assert isinstance(found, FerroError), (log, found)
                refused += 1
                log.pop()
                continue
            expected = expected if isinstance(expected, bool) else np.asarray(expected)
            compare(found, expected, log)
            compared += 1
            if not isinstance(found, DTensor) or found.dtype != expected.dtype:
                continue
            x, whole = found, expected
            if rng.random() < 0.3:
                x = x.redistribute(random_placements(rng, mesh, x.ndim, x.dtype.kind))
                compare(x, whole, log)
    return compared, refused


@pytest.mark.filterwarnings("ignore")
def test_random_expressions():
    compared, refused = 0, 0
    for seed in range(FIRST_SEED, FIRST_SEED + RUNS):
        results = on_mesh(MESHES[seed % len(MESHES)], lambda mesh, seed=seed: trial(mesh, seed))
        assert len(set(results)) == 1
        compared, refused = compared + results[0][0], refused + results[0][1]
    print(f"{compared} results compared, {refused} operations refused")
    assert compared > 2 * RUNS
