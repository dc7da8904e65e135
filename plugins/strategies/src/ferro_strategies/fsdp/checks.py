"""What FSDP checks before it changes anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ferro import UsageError

from ..nn.module import Module
from ..replicas import check_same
from .plan import Plan
from .state import Entry


def check_wrappable(module: Module) -> None:
    """See that a module's parameters are not in pieces already.

    Raises:
        UsageError: they are.
    """
    names = list(module.named_parameters())
    if not names:
        raise UsageError(
            f"FSDP: {type(module).__name__} has no parameters, so there is nothing to cut into "
            "pieces. Use it without FSDP."
        )
    for name, parameter in names:
        if any(split.dim is None for split in parameter.splits):
            raise UsageError(
                f"FSDP: parameter {name!r} is in pieces already. Wrap a model once, as a whole; "
                "`units` says which parts of it are gathered by themselves."
            )


def check_replicas(module: Module, plan: Plan, units: Sequence[str]) -> None:
    """Compare the model and the options over all ranks.

    Raises:
        UsageError: they differ; raised on every rank.
    """
    precision = plan.precision
    options = {
        "sharding": plan.sharding,
        "units": list(units),
        "prefetch": plan.prefetch,
        "offload": plan.offload,
        "param_dtype": _named(precision.param_dtype),
        "reduce_dtype": _named(precision.reduce_dtype),
        "output_dtype": _named(precision.output_dtype),
        "cast_inputs": precision.cast_inputs,
        "shards": plan.ranks,
    }
    fault = ""
    for group in plan.groups:
        # Along a row of a mesh all have the same place in their columns, and the other way round.
        places = [other.rank for other in plan.groups if other is not group]
        # What one row of a mesh has found, its other rows learn from the columns.
        faults: list[str] = group.all_gather_object(fault)
        fault = fault or next((text for text in faults if text), "")
        if not fault:
            try:
                check_same(
                    "FSDP", module, group, options | {"rank along the mesh's other axis": places}
                )
            except UsageError as error:
                fault = str(error)
    if fault:
        raise UsageError(fault)


def check_trained(entries: Mapping[str, Entry]) -> None:
    """See that there is a place for every gradient.

    Raises:
        UsageError: a parameter that was frozen when the module was wrapped is not any more.
    """
    for name, entry in entries.items():
        if entry.parameter.requires_grad and not entry.flat.trained:
            raise UsageError(
                f"FSDP: parameter {name!r} was frozen when the module was wrapped, and now "
                "requires a gradient, for which there is no place. Wrap the module again."
            )


def _named(dtype: npt.DTypeLike | None) -> str:
    return "None" if dtype is None else np.dtype(dtype).name
