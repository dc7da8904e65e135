"""State dicts of an FSDP module: whole or in pieces, one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ferro import UsageError

from ..nn.arrays import Array, namespace_of
from ..nn.module import Buffer, Module
from ..nn.parameter import Parameter
from .flat import Flat
from .gathered import Shards
from .layout import Place
from .memory import moved, put
from .plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatShard:
    """One rank's piece of an array.

    Attributes:
        data: (n,), a run of the flattened array; n may be 0.
        start: where the run begins.
        shape: of the whole array.
    """

    data: Array
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A parameter, and where its pieces are.

    Attributes:
        parameter: the parameter.
        flat: of which it is a part.
        place: where in that.
        piece: this rank's, a view of the shard.
    """

    parameter: Parameter
    flat: Flat
    place: Place
    piece: Array

    @property
    def name(self) -> str:
        """The qualified name."""
        return self.place.name

    def part(self, plan: Plan) -> slice:
        """Return which part of the flattened parameter is this rank's."""
        return self.flat.layout.part(self.place, plan.rank)

    def gather(self, piece: Array, plan: Plan, *, rank0_only: bool) -> Array | None:
        """Put all ranks' pieces of an array like the parameter together.

        Returns:
            A new array; with `rank0_only`, None on all ranks but the first.
        """
        if rank0_only and plan.replicas is not None and plan.replicas.rank != 0:
            return None
        if plan.shards is None:
            return piece.copy()
        sizes = self.flat.layout.sizes(self.place)
        sent = moved(piece, self.flat.namespace)
        if rank0_only:
            whole = plan.shards.gather(sent, sizes=sizes)
        else:
            whole = plan.shards.all_gather(sent, sizes=sizes)
        return None if whole is None else whole.reshape(self.place.shape)

    def shard(self, piece: Array, plan: Plan) -> FlatShard:
        """Copy this rank's piece of an array like the parameter."""
        data = piece.reshape(piece.size).copy()
        return FlatShard(data=data, start=self.part(plan).start, shape=self.place.shape)

    def cut(self, whole: Array, plan: Plan) -> Array:
        """Return this rank's piece of a whole array, shaped as pieces are."""
        return whole.reshape(whole.size)[self.part(plan)].reshape(self.piece.shape)


def entries_of(module: Module, units: Iterable[Shards]) -> dict[str, Entry]:
    """Return what is in pieces, by name, in the order in which the module has it."""
    found = {
        place.name: Entry(parameter=parameter, flat=flat, place=place, piece=piece)
        for unit in units
        for flat in unit.flats
        for parameter, place, piece in zip(
            flat.members, flat.layout.places, flat.pieces, strict=True
        )
    }
    return {name: found[name] for name, _ in module.named_parameters()}


def full(
    entries: Mapping[str, Entry], buffers: Mapping[str, Buffer], plan: Plan, rank0_only: bool
) -> dict[str, Array]:
    """See `FSDP.full_state_dict`."""
    state: dict[str, Array] = {}
    for name, entry in entries.items():
        whole = entry.gather(entry.piece, plan, rank0_only=rank0_only)
        if whole is not None:
            state[name] = whole
    if rank0_only:
        if plan.is_first:
            state |= {name: buffer.data.copy() for name, buffer in buffers.items()}
        return state
    copies = {name: buffer.data.copy() for name, buffer in buffers.items()}
    plan.broadcast(copies.values(), [0] * len(plan.groups))
    return state | copies


def load_full(
    entries: Mapping[str, Entry],
    buffers: Mapping[str, Buffer],
    plan: Plan,
    state: Mapping[str, Array],
) -> None:
    """See `FSDP.load_full_state_dict`."""
    faults = _misnamed({*entries, *buffers}, state)
    for name, array in state.items():
        if name in entries:
            piece, shape = entries[name].piece, entries[name].place.shape
            faults += unlike(name, piece.dtype, shape, array)
        elif name in buffers:
            data = buffers[name].data
            faults += unlike(name, data.dtype, data.shape, array)
    plan.agree(faults, "FSDP.load_full_state_dict: the state does not fit")
    for name, array in state.items():
        if name in entries:
            put(entries[name].piece, entries[name].cut(array, plan))
        else:
            put(buffers[name].data, array)


def sharded(
    entries: Mapping[str, Entry], buffers: Mapping[str, Buffer], plan: Plan
) -> dict[str, FlatShard | Array]:
    """See `FSDP.sharded_state_dict`."""
    state: dict[str, FlatShard | Array] = {}
    for name, entry in entries.items():
        state[name] = entry.shard(entry.piece, plan)
    return state | {name: buffer.data.copy() for name, buffer in buffers.items()}


def load_sharded(
    entries: Mapping[str, Entry],
    buffers: Mapping[str, Buffer],
    plan: Plan,
    state: Mapping[str, FlatShard | Array],
) -> None:
    """See `FSDP.load_sharded_state_dict`."""
    faults = _misnamed({*entries, *buffers}, state)
    loads: list[tuple[Array, Array]] = []
    for name, item in state.items():
        if name in entries:
            entry = entries[name]
            found = wrong_shard(name, entry, entry.piece, item, plan)
            faults += found
            if isinstance(item, FlatShard) and not found:
                loads.append((entry.piece, item.data.reshape(entry.piece.shape)))
        elif name in buffers:
            data = buffers[name].data
            if isinstance(item, FlatShard):
                faults.append(f"{name!r} is a buffer, given a FlatShard")
            else:
                faults += unlike(name, data.dtype, data.shape, item)
                loads.append((data, item))
    plan.agree(faults, "FSDP.load_sharded_state_dict: the state does not fit")
    for target, source in loads:
        put(target, source)


def wrong_shard(name: str, entry: Entry, piece: Array, item: object, plan: Plan) -> list[str]:
    """Say what is wrong with a shard for a place where `piece` is."""
    if not isinstance(item, FlatShard):
        return [f"{name!r} is in pieces, given a {type(item).__name__}"]
    part = entry.part(plan)
    here = (piece.dtype, entry.place.shape, part.start, part.stop)
    there = (item.data.dtype, tuple(item.shape), item.start, item.start + item.data.size)
    if here == there:
        return []
    return [
        f"{name!r} is here {_described(*here)}, given {_described(*there)} (pieces fit as many "
        "ranks and the same units; a full state dict fits any)"
    ]


def _described(dtype: object, shape: tuple[int, ...], start: int, stop: int) -> str:
    return f"{dtype} {shape}, elements {start} to {stop}"


def _misnamed(own: set[str], given: Mapping[str, object]) -> list[str]:
    missing = [f"missing {name!r}" for name in sorted(own - given.keys())]
    return missing + [f"unexpected {name!r}" for name in given if name not in own]


def unlike(name: str, dtype: object, shape: tuple[int, ...], array: Array) -> list[str]:
    """Say what is wrong with an array for a place of this dtype and shape."""
    try:
        namespace_of(array)
    except UsageError as error:  # to be told to the other ranks first
        return [f"{name!r}: {error}"]
    if (dtype, shape) == (array.dtype, array.shape):
        return []
    return [f"{name!r} is {dtype} {shape}, given {array.dtype} {array.shape}"]
