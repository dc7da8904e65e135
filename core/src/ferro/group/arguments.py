"""The arguments and the result of a call: checked input arrays, ranks and tags, and output buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum

import numpy as np

from ferro.arrays import Input, InputArray, dtype_name, dtype_problem
from ferro.backend import Backend
from ferro.collectives.label import MAX_TAG
from ferro.errors import UnsupportedError, UsageError
from ferro.group.group_info import GroupInfo
from ferro.types import Array, Device

_BLOCK_BYTES = 256 << 10


class Reads(Enum):
    """When an operation reads its input; the caller may change the input afterwards."""

    NOW = "now"  # in the call, or when the operation runs, before the call returns
    COPY = "copy"  # in the call, which copies the input
    AT_RUN = "at run"  # each time that the operation runs


def reads_when(async_op: bool, copy: bool = True) -> Reads:
    """Say when an operation reads its input, from the arguments that all collectives take."""
    return Reads.NOW if not async_op else Reads.COPY if copy else Reads.AT_RUN


class OutputBuffer:
    """The memory of a result: the caller's `out`, or a new array of the input's kind.

    `array` has the result's shape; `flat` is the same memory in one dimension, as backends take it.
    """

    __slots__ = ("_gpu_out", "_input", "_out", "array", "device", "flat")

    def __init__(self, input_array: InputArray, out: object, shape: tuple[int, ...], what: str = "out") -> None:
        self._input = input_array
        self._out = out
        self.device = input_array.device
        copied = input_array.copied
        out_device = Device.CUDA if copied else self.device
        given = None if out is None else input_array.output(out, shape, out_device, what)
        self._gpu_out = given if copied else None  # `out`, of which `array` is the host's copy
        array = self.array = input_array.empty(shape) if copied or given is None else given
        self.flat = array if array.ndim == 1 else array.reshape(-1)

    def overlaps(self, source: Array) -> bool:
        """Say whether the result may share memory with an input."""
        return self._out is not None and np.may_share_memory(source, self.flat)

    def __call__(self) -> object:
        """Return the result as the caller expects it."""
        if self._gpu_out is not None:
            self._gpu_out[...] = self._input.convert_result(self.array)  # type: ignore[assignment]
        return self._input.convert_result(self.array) if self._out is None else self._out


class NamedDtypeBuffer:
    """The buffer of a received message that begins with its dtype, which the bytes that follow do not tell."""

    def __init__(self, result: OutputBuffer, dtype: np.dtype) -> None:
        self._result = result
        self._blank = named_dtype(result.flat, dtype)
        self._name_bytes = self._blank.size - result.flat.nbytes
        self.flat, self.device = np.empty_like(self._blank), result.device

    def __call__(self) -> object:
        """Return the caller's buffer with the elements received."""
        name, expected = (array[: self._name_bytes].tobytes().decode() for array in (self.flat, self._blank))
        if name != expected:
            raise UsageError(f"the message received has dtype {name}, and the buffer {expected}")
        self._result.flat[...] = self.flat[self._name_bytes :].view(self._result.flat.dtype)
        return self._result()


def named_dtype(flat: Array, dtype: np.dtype) -> Array:
    """Copy elements to bytes that begin with the name of their dtype."""
    return np.concatenate([np.frombuffer(dtype_name(dtype).encode(), np.uint8), flat.view(np.uint8)])


def copy_elements(source: Array, target: Array) -> None:
    """Copy elements, unless `target` is `source`: `out` is often the input itself.

    A large array is copied block by block, so that the copy stays in the caches. A copy of 4 MiB in one piece bypasses
    the caches, and an all_gather that reads it next takes more than twice as long.
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


def checked_timeout(timeout_s: object) -> float:
    """Return a deadline in seconds, or raise UsageError."""
    most = threading.TIMEOUT_MAX
    if not isinstance(timeout_s, int | float | np.number) or not 0 < timeout_s <= most:
        raise UsageError(f"timeout_s must be a positive number of seconds, at most {most:.0f}, not {timeout_s!r}")
    return float(timeout_s)


def flattened(array: Array, *, copy: bool = False) -> Array:
    """View the elements in one contiguous dimension; copy them if `copy` is true or no such view exists."""
    if copy or not array.flags.c_contiguous:
        array = array.copy()
    return array if array.ndim == 1 else array.reshape(-1)  # a reshape costs even where it changes nothing


class ArgumentChecker:
    """Checks the arguments of one group's calls."""

    def __init__(self, backend: Backend, info: GroupInfo) -> None:
        self._info = info
        self._devices = info.devices
        self._takes_cpu_arrays = Device.CPU in info.devices
        self.rank = backend.rank
        self._world_size = backend.world_size
        self._warned_of_host_copies = False

    def check_input(self, value: Input, *, what: str = "input", moved: bool = False) -> InputArray:
        """Convert an argument to an array that the backend can move, or refuse it; see `InputArray` for `moved`."""
        input_array = InputArray(value, what=what, moved=moved)
        if input_array.device not in self._devices:
            self._copy_to_host(input_array)
        return input_array

    def result_buffer(
        self, x: Input, out: object, reads: Reads, filled: bool = True, *, moved: bool = False
    ) -> tuple[Array, np.dtype, tuple[int, ...], Device, Callable[[], object], tuple[Array, Array] | None]:
        """Prepare the flat memory of a result that has the shape of `x`, `filled` with the elements of `x`.

        Return that memory, the dtype of `x`, the shape, the device, a function that makes the caller's result, and the
        source and target of the copy that fills the result each time, if the operation reads its input when it runs.
        """
        if out is x and type(x) is np.ndarray and self._takes_cpu_arrays and not dtype_problem(x.dtype):
            flags = x.flags
            if flags.c_contiguous and flags.writeable:  # `x` itself is the memory of the result
                return x if x.ndim == 1 else x.reshape(-1), x.dtype, x.shape, Device.CPU, lambda: x, None
        input_array = self.check_input(x, moved=moved)
        array = input_array.array
        result = OutputBuffer(input_array, out, array.shape)
        copy = None
        if filled and reads is Reads.AT_RUN:
            copy = (array, result.array)
        elif filled:
            copy_elements(array, result.array)
        return result.flat, input_array.dtype, array.shape, result.device, result, copy

    def check_message(self, x: Input, *, copy: bool) -> tuple[Array, Device]:
        """Prepare the flat memory of a message, which names the dtype where that is none that backends take."""
        input_array = self.check_input(x, moved=True)
        flat, dtype = flattened(input_array.array, copy=copy), input_array.dtype
        return (flat if dtype is flat.dtype else named_dtype(flat, dtype)), input_array.device

    def check_buffer(self, buffer: Input) -> OutputBuffer | NamedDtypeBuffer:
        """Prepare the flat memory that takes a message."""
        input_array = self.check_input(buffer, what="buffer", moved=True)
        result, dtype = OutputBuffer(input_array, buffer, input_array.array.shape, what="buffer"), input_array.dtype
        return result if dtype is result.flat.dtype else NamedDtypeBuffer(result, dtype)

    def check_rank(self, rank: int, what: str) -> None:
        """Refuse a value that is no rank of the group; the message calls it `what`."""
        if not isinstance(rank, int | np.integer) or not 0 <= rank < self._world_size:
            name = self._info.name
            message = f"{what} is {rank!r}; group {name!r} has ranks 0 to {self._world_size - 1}"
            raise UsageError(message, group=name, rank=self.rank)

    def check_peer(self, peer: int, verb: str, tag: int) -> None:
        """Refuse a peer that is no other rank of the group, and a wrong tag."""
        self.check_rank(peer, "peer")
        if peer == self.rank:
            message = f"rank {self.rank} cannot {verb} itself: copy the array instead, or use sendrecv in both roles"
            raise UsageError(message, group=self._info.name, rank=self.rank, peer=peer)
        self.check_tag(tag)

    def check_tag(self, tag: int) -> None:
        """Refuse a wrong tag."""
        if not isinstance(tag, int | np.integer) or not 0 <= tag <= MAX_TAG:
            raise UsageError(f"tag is {tag!r}; tags are whole numbers from 0 to {MAX_TAG}")

    def _copy_to_host(self, input_array: InputArray) -> None:
        """Copy a GPU array that the backend does not take, where the user allows it; or refuse the array."""
        device, backend_name = input_array.device, self._info.backend_name
        if device is not Device.CUDA or not self._info.host_copies:
            from ferro import backends  # here, since it looks at all installed plugins

            names = " or ".join(backends.supporting(device))
            raise UnsupportedError(
                f"backend {backend_name!r} takes arrays on {', '.join(self._devices)}, and this one is on {device}: "
                f"use a backend for {device}{f' ({names})' if names else ''}, or set "
                "FERRO_ENABLE_GPU_FALLBACK=1 to copy through the host"
            )
        if not self._warned_of_host_copies:
            self._warned_of_host_copies = True
            import logging  # here, since it is slow to import and seldom needed

            message = "group %r (%s) copies GPU arrays through the host"
            logging.getLogger("ferro").warning(message, self._info.name, backend_name)
        input_array.copy_to_host()
