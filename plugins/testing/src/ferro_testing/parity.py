"""Parity: the same training on many ranks and in one process, parameter by parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ferro.types import Array


def assert_same_parameters(
    reference: Mapping[str, Array], others: Sequence[Mapping[str, Array]], *, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Compare every parameter of every rank with the one-process run.

    Args:
        reference: name -> array, after the one-process run.
        others: the same of each rank, by rank.
        rtol: allowed difference relative to the reference's largest absolute value; within one
            array small elements are sums of large ones, so all elements have the same tolerance.
        atol: allowed absolute difference, in addition.

    Raises:
        AssertionError: lists every parameter that is absent, of another shape or dtype, or too
            far away, with the rank and the largest difference.
    """
    complaints = [
        f"rank {rank}: {name}: {complaint}"
        for rank, parameters in enumerate(others)
        for name in sorted({*reference, *parameters})
        if (complaint := _difference(reference.get(name), parameters.get(name), rtol, atol))
    ]
    if complaints:
        listing = "\n".join(complaints)
        raise AssertionError(f"{len(complaints)} parameters differ from one process:\n{listing}")


def _difference(wanted: Array | None, found: Array | None, rtol: float, atol: float) -> str:
    """Describe the difference of one parameter, "" when there is none."""
    if wanted is None or found is None:
        return "only there in one process" if found is None else "not there in one process"
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return f"{found.dtype}{found.shape} in place of {wanted.dtype}{wanted.shape}"
    if wanted.size == 0:
        return ""
    kind = np.complex128 if wanted.dtype.kind == "c" else np.float64
    exact, near = wanted.astype(kind), found.astype(kind)
    largest = float(np.max(np.abs(near - exact)))
    allowed = atol + rtol * float(np.max(np.abs(exact)))
    if largest <= allowed:  # False for a NaN, which is a difference, too
        return ""
    return f"largest difference {largest:.3g}, allowed {allowed:.3g}"
