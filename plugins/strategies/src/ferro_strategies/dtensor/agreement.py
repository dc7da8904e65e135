"""What the ranks of a mesh tell each other before an operation: values of all ranks, and errors of some."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

from ferro import UsageError

from ..mesh import DeviceMesh

_Result = TypeVar("_Result")


def gather_by_coordinates(value: object, mesh: DeviceMesh) -> dict[tuple[int, ...], Any]:
    """Gather one value from every rank of the mesh; the keys are the ranks' coordinates."""
    gathered: list[Any] = [value]
    for axis in reversed(range(mesh.ndim)):  # the last axis varies fastest
        lists = mesh.group(axis).all_gather_object(gathered)
        gathered = list(itertools.chain.from_iterable(lists))
    coordinates = itertools.product(*(range(size) for size in mesh.shape))
    return dict(zip(coordinates, gathered, strict=True))


def compute_agreed(op: str, mesh: DeviceMesh, function: Callable[[], _Result]) -> _Result:
    """Call a function that may raise an error on some ranks only; if it does, every rank of the mesh raises.

    Raises:
        UsageError: another rank's function raised. A rank whose own function raised raises that error.
    """
    failure, result = None, None
    try:
        result = function()
    except Exception as error:  # noqa: BLE001 - every error counts, since the other ranks would wait in vain
        failure = error
    text = failure and f"{type(failure).__name__}: {failure}"
    failed = {at: found for at, found in gather_by_coordinates(text, mesh).items() if found}
    if failure is not None:
        raise failure
    if failed:
        at, found = next(iter(failed.items()))
        raise UsageError(
            f"{op}: rank {mesh.rank_of(at)} failed on its part, so that no rank has a result: {found}", op=op,
            rank=mesh.parent.rank, peer=mesh.rank_of(at),
        )  # fmt: skip
    return result  # type: ignore[return-value]
