"""ShardedParameter: one parameter and its shards, for saving and loading."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ferro import UsageError

from ..nn.arrays import Array, namespace_of
from ..nn.module import Module
from ..nn.parameter import Parameter
from .buffer_pool import to_namespace
from .config import FSDPConfig
from .flat_parameter import FlatParameter
from .flat_parameter_group import FlatParameterGroup
from .layout import ParameterSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatShard:
    """One rank's part of an array.

    Attributes:
        data: (n,), consecutive elements of the flattened array; n may be 0.
        start: the index of the first of them.
        shape: the shape of the whole array.
    """

    data: Array
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedParameter:
    """A parameter and its position in a flat parameter.

    Its methods take arrays of the parameter's shape, such as its value or an optimizer's moments.

    Attributes:
        parameter: the parameter.
        flat: the flat parameter that contains it.
        span: its position there.
        shard_view: this rank's part of the value, a view of the shard.
    """

    parameter: Parameter
    flat: FlatParameter
    span: ParameterSpan
    shard_view: Array

    @property
    def name(self) -> str:
        """The qualified name."""
        return self.span.name

    def gather(self, part: Array, config: FSDPConfig, *, rank0_only: bool) -> Array | None:
        """Gather an array from all ranks' parts.

        Returns:
            A new array; with `rank0_only`, None on all ranks but the first.
        """
        if rank0_only and config.replica_group is not None and config.replica_group.rank != 0:
            return None
        if config.shard_group is None:
            return part.copy()
        sizes = self.flat.layout.shard_sizes(self.span)
        sent = to_namespace(part, self.flat.namespace)
        if rank0_only:
            whole = config.shard_group.gather(sent, sizes=sizes)
        else:
            whole = config.shard_group.all_gather(sent, sizes=sizes)
        return None if whole is None else whole.reshape(self.span.shape)

    def flat_shard(self, part: Array, config: FSDPConfig) -> FlatShard:
        """Copy this rank's part of an array."""
        data = part.reshape(part.size).copy()
        return FlatShard(data=data, start=self._slice(config).start, shape=self.span.shape)

    def local_part(self, whole: Array, config: FSDPConfig) -> Array:
        """View this rank's part of a whole array, in the shape of `shard_view`."""
        return whole.reshape(whole.size)[self._slice(config)].reshape(self.shard_view.shape)

    def shard_faults(self, key: str, dtype: np.dtype, item: object, config: FSDPConfig) -> list[str]:
        """List the reasons why `item` cannot be loaded as this rank's part, of `dtype`; empty if it can."""
        if not isinstance(item, FlatShard):
            return [f"{key!r} is in pieces, given a {type(item).__name__}"]
        own = self._slice(config)
        here = (dtype, self.span.shape, own.start, own.stop)
        given = (item.data.dtype, tuple(item.shape), item.start, item.start + item.data.size)
        if here == given:
            return []
        return [
            f"{key!r} is here {_described(*here)}, given {_described(*given)} (pieces fit as many "
            "ranks and the same units; a full state dict fits any)"
        ]

    def _slice(self, config: FSDPConfig) -> slice:
        return self.flat.layout.slice_in_parameter(self.span, config.shard_rank)


def array_faults(key: str, dtype: object, shape: tuple[int, ...], array: Array) -> list[str]:
    """List the reasons why `array` cannot be loaded as this dtype and shape; empty if it can."""
    try:
        namespace_of(array)
    except UsageError as error:  # The other ranks must learn of it first.
        return [f"{key!r}: {error}"]
    if (dtype, shape) == (array.dtype, array.shape):
        return []
    return [f"{key!r} is {dtype} {shape}, given {array.dtype} {array.shape}"]


def sharded_parameters(module: Module, units: Iterable[FlatParameterGroup]) -> dict[str, ShardedParameter]:
    """List the parameters of all units by name, in the module's order."""
    found = {
        span.name: ShardedParameter(parameter=parameter, flat=flat, span=span, shard_view=view)
        for unit in units
        for flat in unit.flat_parameters
        for parameter, span, view in zip(flat.parameters, flat.layout.spans, flat.shard_views, strict=True)
    }
    return {name: found[name] for name, _ in module.named_parameters()}


def _described(dtype: object, shape: tuple[int, ...], start: int, stop: int) -> str:
    return f"{dtype} {shape}, elements {start} to {stop}"
