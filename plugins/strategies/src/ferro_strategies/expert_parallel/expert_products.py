"""Products of rows sorted by expert with each expert's matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from ..nn.arrays import Array, matmul, namespace_of, wide_dtype
from ..nn.sums import column_sums


def expert_matmul(rows: Array, weights: Array, biases: Array | None, counts: Sequence[int]) -> Array:
    """Multiply each expert's rows by its matrix, and add its bias.

    Args:
        rows: (N, a), sorted by expert.
        weights: (experts, a, b).
        biases: (experts, b), or None.
        counts: rows of each expert.

    Returns:
        (N, b).
    """
    xp = namespace_of(rows)
    result: Array = xp.empty((rows.shape[0], weights.shape[2]), rows.dtype)
    for expert, part in _parts(counts):
        matmul(rows[part], weights[expert], out=result[part])
        if biases is not None:
            result[part] += biases[expert]
    return result


def gradient_of_products(rows: Array, grads: Array, counts: Sequence[int]) -> tuple[Array, Array]:
    """Compute the gradients of weights, (experts, a, b), and biases, (experts, b), of `expert_matmul`."""
    xp = namespace_of(rows)
    of_weights = xp.zeros((len(counts), rows.shape[1], grads.shape[1]), rows.dtype)
    of_biases = xp.zeros((len(counts), grads.shape[1]), wide_dtype(rows.dtype))
    for expert, part in _parts(counts):
        matmul(rows[part].T, grads[part], out=of_weights[expert])
        of_biases[expert] = column_sums(grads[part])
    return of_weights, of_biases.astype(rows.dtype, copy=False)


def _parts(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield the rows of each expert that has any."""
    for expert, (start, stop) in enumerate(pairwise((0, *accumulate(counts)))):
        if start < stop:
            yield expert, slice(start, stop)
