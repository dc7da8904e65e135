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
    """The memory of a result: the caller's `out`, or a new array of the input's kind.

    `array` has the result's shape; `flat` is the same memory in one dimension, as backends take it.
    """

    __slots__ = ("_gpu_out", "_input", "_out", "array", "device", "flat")

    def __init__(self, input_array: InputArray, out: object, shape: tuple[int, ...], what: str = "out") -> None:
        self._input = input_array
        self._out = out
        self.device = input_array.device
        self._gpu_out: Array | None = None  # `out` on a GPU, of which `array` is the host's copy
        if out is None:
            array = input_array.empty(shape)
        elif input_array.copied:
            self._gpu_out = output_array(out, shape, input_array.array.dtype, Device.CUDA, what)
            array = input_array.empty(shape)
        else:
            array = output_array(out, shape, input_array.array.dtype, input_array.device, what)
        self.array: Array = array
        self.flat: Array = array if array.ndim == 1 else array.reshape(-1)

    def copy_if_overlapping(self, source: Array) -> Array:
        """Return a flat input, or a copy of it where the result may share its memory."""
        overlapping = self._out is not None and np.may_share_memory(source, self.flat)
        return source.copy() if overlapping else source

    def __call__(self) -> object:
        """Return the result as the caller expects it."""
        if self._gpu_out is not None:
            self._gpu_out[...] = self._input.convert_result(self.array)  # type: ignore[assignment]
        return self._input.convert_result(self.array) if self._out is None else self._out


def writable_in_place(x: object) -> TypeGuard[Array]:
    """Say whether a result can be written to the input without any preparation."""
    if type(x) is not np.ndarray or dtype_problem(x.dtype):
        return False
    flags = x.flags
    return flags.c_contiguous and flags.writeable


def copy_elements(source: Array, target: Array) -> None:
    """Copy elements, unless `target` is `source`: `out` is often the input itself.

    A large array is copied block by block and so stays in the caches. Copied all at once it would be written past them:
    of 4 MiB, an all_gather that reads them next then takes more than twice as long.
    """
    if target is source:
        return
    both = (source, target)
    large = source.nbytes > _BLOCK_BYTES and all(isinstance(a, np.ndarray) and a.flags.c_contiguous for a in both)
    if not large or np.may_share_memory(target, source):
        target[...] = source
        return
    into, data = target.reshape(-1), source.reshape(-1)
    step = _BLOCK_BYTES // data.itemsize
    for start in range(0, data.size, step):
        into[start : start + step] = data[start : start + step]


def flattened(array: Array, *, copy: bool = False) -> Array:
    """Return the elements in one contiguous dimension; copied if `copy`, or where they must be."""
    if copy or not array.flags.c_contiguous:
        array = array.copy()
    return array if array.ndim == 1 else array.reshape(-1)  # a reshape costs even where it changes nothing


class ArgumentChecker:
    """Checks the arguments of one group's calls."""

    def __init__(self, backend: Backend, info: GroupInfo) -> None:
        self._info = info
        self._devices = info.devices
        self._rank = backend.rank
        self._world_size = backend.world_size
        self._warned_of_host_copies = False

    def check_input(self, value: Input, *, what: str = "input") -> InputArray:
        """Convert an argument to an array on a device from which the backend moves it, or refuse it."""
        input_array = InputArray(value, what=what)
        if input_array.device in self._devices:
            return input_array
        if input_array.device is Device.CUDA and self._info.host_copies:
            self._warn_of_host_copies()
            input_array.copy_to_host()
            return input_array
        raise UnsupportedError(
            f"backend {self._info.backend_name!r} takes arrays on {', '.join(self._devices)}, "
            f"and this one is on {input_array.device}: use {_backends_for(input_array.device)}, or set "
            "FERRO_ENABLE_GPU_FALLBACK=1 to copy through the host"
        )

    def check_rank(self, rank: int, what: str) -> None:
        """Refuse a value that is no rank of the group; the message calls it `what`."""
        if not isinstance(rank, int | np.integer) or not 0 <= rank < self._world_size:
            name = self._info.name
            message = f"{what} is {rank!r}; group {name!r} has ranks 0 to {self._world_size - 1}"
            raise UsageError(message, group=name, rank=self._rank)

    def check_peer(self, peer: int, verb: str, tag: int) -> None:
        """Refuse a peer that is no other rank of the group, and a wrong tag."""
        self.check_rank(peer, "peer")
        if peer == self._rank:
            message = f"rank {self._rank} cannot {verb} itself: copy the array instead"
            raise UsageError(message, group=self._info.name, rank=self._rank, peer=peer)
        if not isinstance(tag, int | np.integer) or not 0 <= tag <= MAX_TAG:
            raise UsageError(f"tag is {tag!r}; tags are whole numbers from 0 to {MAX_TAG}")

    def _warn_of_host_copies(self) -> None:
        if not self._warned_of_host_copies:
            self._warned_of_host_copies = True
            import logging  # here, for it is slow to import and seldom needed

            logging.getLogger("ferro").warning(
                "group %r (%s) copies GPU arrays through the host", self._info.name, self._info.backend_name
            )


def _backends_for(device: Device) -> str:
    """Name the installed backends for arrays on a device."""
    from ferro import backends  # here, for it looks at all that is installed

    names = backends.supporting(device)
    return f"a backend for {device}" + (f" ({' or '.join(names)})" if names else "")
