"""What a call is given and gives back: checked input arrays, ranks and tags, and output buffers."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np

from ferro.arrays import Input, InputArray, dtype_problem, output_array
from ferro.backend import Backend
from ferro.collectives.label import MAX_TAG
from ferro.errors import UnsupportedError, UsageError
from ferro.group.group_info import GroupInfo
from ferro.types import Array, Device

_BLOCK_BYTES = 256 << 10


class OutputBuffer:
    """Where a result goes: the caller's `out`, or a new array of the caller's kind.

    Attributes:
        array: the memory, in the result's shape.
        flat: the same memory in one dimension, as backends take it.
        device: where that memory is.
    """

    __slots__ = ("_entry", "_far", "_out", "array", "device", "flat")

    def __init__(self, entry: InputArray, out: object, shape: tuple[int, ...], what: str = "out") -> None:
        self._entry = entry
        self._out = out
        self.device = entry.device
        self._far: Array | None = None  # `out` on a GPU, of which `array` is the host's copy
        if out is None:
            array = entry.empty(shape)
        elif entry.copied:
            self._far = output_array(out, shape, entry.array.dtype, Device.CUDA, what)
            array = entry.empty(shape)
        else:
            array = output_array(out, shape, entry.array.dtype, entry.device, what)
        self.array: Array = array
        self.flat: Array = array if array.ndim == 1 else array.reshape(-1)

    def fill(self, array: Array) -> None:
        """Copy the operand in, unless it is there already: `out` is often the input itself."""
        if self.array is not array:
            fill(self.array, array)

    def apart(self, source: Array) -> Array:
        """Return a flat operand, or a copy where the result may come to lie in its memory."""
        if self._out is not None and np.may_share_memory(source, self.flat):
            return source.copy()
        return source

    def __call__(self) -> object:
        """Return the result as the caller expects it."""
        if self._far is not None:
            self._far[...] = self._entry.convert_result(self.array)  # type: ignore[assignment]
        return self._entry.convert_result(self.array) if self._out is None else self._out


class InPlace:
    """An `OutputBuffer` that is the operand itself: a NumPy array that is ready as it is."""

    __slots__ = ("array", "flat")

    device = Device.CPU

    def __init__(self, array: Array) -> None:
        self.array = array
        self.flat = array if array.ndim == 1 else array.reshape(-1)

    def __call__(self) -> Array:
        """Return the result as the caller expects it."""
        return self.array


def takes_in_place(x: object) -> TypeGuard[Array]:
    """Say whether a result can be written to the operand without any preparation."""
    if type(x) is not np.ndarray or dtype_problem(x.dtype):
        return False
    flags = x.flags
    return flags.c_contiguous and flags.writeable


def fill(target: Array, source: Array) -> None:
    """Copy elements, a large array block by block: it stays in the caches for what comes next.

    Copied all at once it would be written past them: of 4 MiB, an all_gather that reads them
    next then takes more than twice as long.
    """
    small = source.nbytes <= _BLOCK_BYTES
    if small or not _in_blocks(target, source) or np.may_share_memory(target, source):
        target[...] = source
        return
    into, data = target.reshape(-1), source.reshape(-1)
    step = _BLOCK_BYTES // data.itemsize
    for start in range(0, data.size, step):
        into[start : start + step] = data[start : start + step]


def _in_blocks(*arrays: Array) -> bool:
    return all(isinstance(array, np.ndarray) and array.flags.c_contiguous for array in arrays)


def flat(array: Array, *, private: bool) -> Array:
    """Return the elements in one contiguous dimension; a copy when `private`."""
    if private or not array.flags.c_contiguous:
        array = array.copy()
    return _in_one_dimension(array)


def _in_one_dimension(array: Array) -> Array:
    """Return a contiguous array as one of one dimension; a reshape costs even where it is one."""
    return array if array.ndim == 1 else array.reshape(-1)


class Operands:
    """Checks what one group is given."""

    def __init__(self, backend: Backend, members: GroupInfo) -> None:
        self._members = members
        self._devices = members.devices
        self._rank = backend.rank
        self._world_size = backend.world_size
        self._told_host_copy = False

    def enter(self, value: Input, *, what: str = "input") -> InputArray:
        """Take an array in, on a device from which the backend moves it.

        Raises:
            UsageError: it is not an array.
            UnsupportedError: the backend takes no such array.
        """
        entry = InputArray(value, what=what)
        if entry.device in self._devices:
            return entry
        if entry.device is Device.CUDA and self._members.host_copies:
            self._tell_host_copy()
            entry.copy_to_host()
            return entry
        raise UnsupportedError(
            f"backend {self._members.backend_name!r} takes arrays on {', '.join(self._devices)}, "
            f"and this one is on {entry.device}: use {_backends_for(entry.device)}, or set "
            "FERRO_ENABLE_GPU_FALLBACK=1 to copy through the host"
        )

    def check_rank(self, rank: int, what: str) -> None:
        """Refuse what is no rank of the group; `what` it is called is for the message."""
        if not isinstance(rank, int | np.integer) or not 0 <= rank < self._world_size:
            name = self._members.name
            raise UsageError(
                f"{what} is {rank!r}; group {name!r} has ranks 0 to {self._world_size - 1}", group=name, rank=self._rank
            )

    def check_peer(self, peer: int, what: str, tag: int) -> None:
        """Refuse what is no other rank of the group, or no tag; `what` is to be done with it."""
        self.check_rank(peer, "peer")
        if peer == self._rank:
            raise UsageError(
                f"rank {self._rank} cannot {what} itself: copy the array instead",
                group=self._members.name,
                rank=self._rank,
                peer=peer,
            )
        if not isinstance(tag, int | np.integer) or not 0 <= tag <= MAX_TAG:
            raise UsageError(f"tag is {tag!r}; tags are whole numbers from 0 to {MAX_TAG}")

    def _tell_host_copy(self) -> None:
        """Log, once, that arrays take the slow way that the user allowed."""
        if not self._told_host_copy:
            self._told_host_copy = True
            import logging  # here, for it is slow to import and seldom needed

            logging.getLogger("ferro").warning(
                "group %r (%s) copies GPU arrays through the host", self._members.name, self._members.backend_name
            )


def _backends_for(device: Device) -> str:
    """Name what is installed for arrays on a device."""
    from ferro import backends  # here, for it looks at all that is installed

    names = backends.supporting(device)
    return f"a backend for {device}" + (f" ({' or '.join(names)})" if names else "")
