"""Checks that FSDP makes before it changes anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ferro import UsageError

from ..nn.checks import first_few
from ..nn.module import Module
from ..replicas import check_same
from .config import FSDPConfig
from .sharded_parameter import ShardedParameter


def check_unsharded(module: Module) -> None:
    """Check that a module has parameters, and that none is sharded already.

    Raises:
        UsageError: it has no parameter, or one is sharded.
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


def check_same_everywhere(module: Module, config: FSDPConfig, units: Sequence[str]) -> None:
    """Compare the model and the options over all ranks.

    Raises:
        UsageError: ranks differ; raised on every rank.
    """
    precision = config.precision
    options = {
        "sharding": config.sharding,
        "units": list(units),
        "prefetch": config.prefetch,
        "offload": config.offload,
        "check_replicas": config.check_replicas,
        "param_dtype": _dtype_name(precision.param_dtype),
        "reduce_dtype": _dtype_name(precision.reduce_dtype),
        "output_dtype": _dtype_name(precision.output_dtype),
        "cast_inputs": precision.cast_inputs,
        "shards": config.num_shards,
    }
    fault = ""
    for group in config.groups:
        # All ranks of one row of the mesh have the same rank in their column groups, and vice versa.
        other_ranks = [other.rank for other in config.groups if other is not group]
        # The columns pass a fault found in one row of the mesh on to the other rows.
        faults: list[str] = group.all_gather_object(fault)
        fault = fault or next((text for text in faults if text), "")
        if not fault:
            try:
                check_same("FSDP", module, group, options | {"rank along the mesh's other axis": other_ranks})
            except UsageError as error:
                fault = str(error)
    if fault:
        raise UsageError(fault)


def check_tree(module: Module, sharded: Mapping[str, ShardedParameter]) -> None:
    """Check that the model still has the parameters that it had when it was wrapped.

    Raises:
        UsageError: a parameter was added, replaced or removed; the message names it.
    """
    present = dict(module.named_parameters())
    known = {id(item.parameter) for item in sharded.values()}
    found = {id(parameter) for parameter in present.values()}
    new = [name for name, parameter in present.items() if id(parameter) not in known]
    gone = [name for name, item in sharded.items() if id(item.parameter) not in found and name not in new]
    if new or gone:
        changes = [f"{name!r} was {'replaced' if name in sharded else 'added'}" for name in new]
        changes += [f"{name!r} was removed" for name in gone]
        raise UsageError(
            f"FSDP: the parameters of the model are no longer those that were sharded when it was wrapped: "
            f"{'; '.join(first_few(changes))}. Gradients of new ones would not be averaged, nor would they be saved. "
            "Change the layers first, and then wrap the model."
        )


def check_trained(sharded: Mapping[str, ShardedParameter]) -> None:
    """Check that there is memory for every gradient.

    Raises:
        UsageError: a parameter requires a gradient that was frozen when the module was wrapped.
    """
    for name, item in sharded.items():
        if item.parameter.requires_grad and not item.flat.trained:
            raise UsageError(
                f"FSDP: parameter {name!r} was frozen when the module was wrapped, and now "
                "requires a gradient, for which there is no place. Wrap the module again."
            )


def _dtype_name(dtype: npt.DTypeLike | None) -> str:
    return "None" if dtype is None else np.dtype(dtype).name
