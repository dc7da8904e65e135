"""Conversion of a serial layer to a parallel one: checks, and this rank's copies of its parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from ferro import ProcessGroup, UsageError

from ..nn.arrays import Array
from ..nn.module import Module
from ..nn.parameter import Parameter, Split
from ..replicas import check_same
from .sharding import local_shard, shard_slice

Layer = TypeVar("Layer", bound=Module)
_SAMPLES = 16


def check_serial_layer(
    maker: type[Module], layer: Module, kind: type[Layer], group: ProcessGroup, options: Mapping[str, object]
) -> Layer:
    """Check that `layer` is of type `kind`, unsharded, and the same on all ranks, which all call this.

    Only a sample of the values is compared, which is enough to find seeds that differ.

    Raises:
        UsageError: a check fails; raised on every rank when ranks differ.
    """
    name = maker.__name__
    if type(layer) is not kind:
        raise UsageError(f"{name} is made of {kind.__name__}, not of {layer!r}.")
    for parameter_name, parameter in layer.named_parameters():
        if parameter.dtype.kind == "c":
            raise UsageError(f"{name}: parameter {parameter_name!r} is complex; tensor-parallel layers are real.")
        if parameter.splits:
            raise UsageError(
                f"{name}: parameter {parameter_name!r} of {layer!r} is in pieces already. Make "
                "tensor-parallel layers first, then wrap the model in what shards it."
            )
    layer.materialize()
    samples = {
        f"values of {parameter_name} (give all ranks one rng seed)": _sample(parameter.data)
        for parameter_name, parameter in layer.named_parameters()
    }
    check_same(name, layer, group, {**options, **samples})
    return layer


def check_shard_sizes(maker: type[Module], what: str, total: int, sizes: tuple[int, ...], group: ProcessGroup) -> None:
    """Check that there is one size for each rank, at least 1, and that the sizes add up to `total`.

    Raises:
        UsageError: the sizes do not fit.
    """
    n = group.world_size
    if len(sizes) != n or sum(sizes) != total or min(sizes) < 1:
        raise UsageError(
            f"{maker.__name__}: {total} {what} cannot be cut into {sizes} for the {n} ranks of "
            f"group {group.name!r}: each rank needs at least one. Use a smaller group."
        )


def sharded_copy(parameter: Parameter, group: ProcessGroup, dim: int, sizes: tuple[int, ...]) -> Parameter:
    """Make a parameter that holds a copy of this rank's shard."""
    shard = _like(parameter, local_shard(parameter.data, group, dim, sizes).copy())
    start = shard_slice(sizes, group.rank).start
    shard.splits = (Split(group=group, dim=dim, shape=parameter.data.shape, start=start),)
    return shard


def replicated_copy(parameter: Parameter) -> Parameter:
    """Make a parameter that holds a copy of the whole."""
    return _like(parameter, parameter.data.copy())


def generator_of_rank(generator: np.random.Generator, position: int, rank: int) -> np.random.Generator:
    """Make a generator of the same kind for one rank, derived from the state of one that is the same on all ranks.

    Args:
        generator: it is not advanced.
        position: tells generators of equal states apart.
        rank: the rank.
    """
    bits = generator.bit_generator
    digest = hashlib.sha256(repr(bits.state).encode()).digest()
    seed = np.random.SeedSequence(int.from_bytes(digest), spawn_key=(position, rank))
    return np.random.Generator(type(bits)(seed))


def _like(parameter: Parameter, data: Array) -> Parameter:
    return Parameter(data, name=parameter.name, requires_grad=parameter.requires_grad)


def _sample(data: Array) -> str:
    """Write a few elements, evenly spread, as text."""
    flat = data.reshape(data.size)
    return str(flat[:: max(1, data.size // _SAMPLES)].tolist())
