"""The protocols of `library` implemented by CuPy. Importing this module imports CuPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import cupy
import numpy as np
from cupy.cuda import driver, nccl, runtime

from ferro.errors import BackendError, BackendUnavailable, UsageError
from ferro.types import Array
from ferro_nccl.library import Communicator, Gpu, GpuEvent, GpuStream

_NOT_READY = 600  # cudaErrorNotReady


class CupyGpu:
    """See `Gpu`."""

    def __init__(self, index: int) -> None:
        self.index = index
        # CuPy cuts a UUID at its first zero byte, so the address on the bus is added.
        uuid = bytes(runtime.getDeviceProperties(index)["uuid"])[:16].hex()
        self.uuid = f"{uuid} at {runtime.deviceGetPCIBusId(index)}"

    @contextmanager
    def current(self) -> Iterator[None]:
        """See `Gpu.current`; cupy.cuda.Device keeps its stack in the object, not per thread."""
        before = runtime.getDevice()
        if before == self.index:
            yield
            return
        used = bool(driver.ctxGetCurrent())
        runtime.setDevice(self.index)
        try:
            yield
        finally:
            if used:  # else `before` is only CUDA's default, and setting it makes a context there
                runtime.setDevice(before)

    def use(self) -> None:
        """See `Gpu.use`."""
        runtime.setDevice(self.index)

    def new_stream(self) -> GpuStream:
        """See `Gpu.new_stream`."""
        with self.current():
            stream: GpuStream = cupy.cuda.Stream(non_blocking=True)
            return stream

    def current_stream(self) -> GpuStream:
        """See `Gpu.current_stream`."""
        stream: GpuStream = cupy.cuda.get_current_stream(self.index)
        return stream

    def new_event(self) -> GpuEvent:
        """See `Gpu.new_event`."""
        event: GpuEvent = cupy.cuda.Event(disable_timing=True)
        return event

    def ended(self, event: GpuEvent) -> bool:
        """See `Gpu.ended`; `Event.done` cannot tell a failure from work under way."""
        with self.current():  # the query itself makes a context on the thread's GPU
            status: int = runtime.eventQuery(event.ptr)  # type: ignore[attr-defined]
        if status not in (0, _NOT_READY):
            error = runtime.CUDARuntimeError(status)
            raise BackendError(f"work on GPU {self.index} failed: {error}", code=status)
        return status == 0

    def address(self, array: Array) -> int:
        """See `Gpu.address`."""
        memory: Any = array.data  # a cupy.cuda.MemoryPointer
        if memory.device_id != self.index:
            raise UsageError(
                f"an array is on GPU {memory.device_id}, this group's arrays are on GPU "
                f"{self.index}: make them within `with cupy.cuda.Device({self.index})`"
            )
        address: int = memory.ptr
        return address

    def empty(self, count: int, dtype: np.dtype) -> Array:
        """See `Gpu.empty`."""
        array: Array = cupy.empty(count, dtype)
        return array

    def pinned(self, nbytes: int) -> tuple[int, Array]:
        """See `Gpu.pinned`."""
        memory = cupy.cuda.alloc_pinned_memory(nbytes)
        return memory.ptr, np.frombuffer(memory, np.uint8, nbytes)

    def copy(self, target: int, source: int, nbytes: int, stream: GpuStream) -> None:
        """See `Gpu.copy`."""
        runtime.memcpyAsync(target, source, nbytes, runtime.memcpyDefault, stream.ptr)


class CupyCommunicator:
    """See `Communicator`."""

    def __init__(self, native: Any) -> None:  # CuPy has no types
        self._native = native

    def all_reduce(self, source: int, target: int, count: int, dtype: int, op: int, stream: int) -> None:
        """See `Communicator.all_reduce`."""
        with _translated_errors:
            self._native.allReduce(source, target, count, dtype, op, stream)

    def reduce(self, source: int, target: int, count: int, dtype: int, op: int, root: int, stream: int) -> None:
        """See `Communicator.reduce`."""
        with _translated_errors:
            self._native.reduce(source, target, count, dtype, op, root, stream)

    def broadcast(self, source: int, target: int, count: int, dtype: int, root: int, stream: int) -> None:
        """See `Communicator.broadcast`."""
        with _translated_errors:
            self._native.broadcast(source, target, count, dtype, root, stream)

    def reduce_scatter(self, source: int, target: int, count: int, dtype: int, op: int, stream: int) -> None:
        """See `Communicator.reduce_scatter`."""
        with _translated_errors:
            self._native.reduceScatter(source, target, count, dtype, op, stream)

    def all_gather(self, source: int, target: int, count: int, dtype: int, stream: int) -> None:
        """See `Communicator.all_gather`."""
        with _translated_errors:
            self._native.allGather(source, target, count, dtype, stream)

    def send(self, source: int, count: int, dtype: int, peer: int, stream: int) -> None:
        """See `Communicator.send`."""
        with _translated_errors:
            self._native.send(source, count, dtype, peer, stream)

    def recv(self, target: int, count: int, dtype: int, peer: int, stream: int) -> None:
        """See `Communicator.recv`."""
        with _translated_errors:
            self._native.recv(target, count, dtype, peer, stream)

    def async_error(self) -> int:
        """See `Communicator.async_error`."""
        return async_error(self._native.check_async_error, nccl.NcclError)

    def split(self, color: int, key: int) -> Communicator | None:
        """See `Communicator.split`."""
        with _translated_errors:
            native = self._native.commSplit(color, key)
        return None if native is None else CupyCommunicator(native)

    def abort(self) -> None:
        """See `Communicator.abort`."""
        self._native.abort()

    def destroy(self) -> None:
        """See `Communicator.destroy`."""
        self._native.destroy()


class CupyLibrary:
    """See `NcclLibrary`.

    Raises:
        BackendUnavailable: CuPy found no NCCL.
    """

    def __init__(self) -> None:
        if not nccl.available:
            raise BackendUnavailable(
                "nccl",
                "CuPy cannot load libnccl.so.2",
                "Install nvidia-nccl-cu13 (CUDA 12: nvidia-nccl-cu12) beside CuPy.",
            )

    def version(self) -> int:
        """See `NcclLibrary.version`."""
        version: int = nccl.get_version()
        return version

    def device_count(self) -> int:
        """See `NcclLibrary.device_count`."""
        try:
            count: int = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as error:
            raise BackendUnavailable(
                "nccl",
                f"CUDA cannot be used: {error}",
                "Check with nvidia-smi that the driver works and fits CuPy's CUDA version.",
            ) from error
        return count

    def gpu(self, index: int) -> Gpu:
        """See `NcclLibrary.gpu`."""
        return CupyGpu(index)

    def unique_id(self) -> bytes:
        """See `NcclLibrary.unique_id`."""
        with _translated_errors:
            return bytes(nccl.get_unique_id())

    def connect(self, world_size: int, unique_id: bytes, rank: int) -> Communicator:
        """See `NcclLibrary.connect`."""
        with _translated_errors:
            return CupyCommunicator(nccl.NcclCommunicator(world_size, unique_id, rank))

    @contextmanager
    def grouped(self) -> Iterator[None]:
        """See `NcclLibrary.grouped`."""
        with _translated_errors:
            nccl.groupStart()
        try:
            yield
        except BaseException:
            with suppress(Exception):  # the first error is the one to raise
                nccl.groupEnd()
            raise
        with _translated_errors:
            nccl.groupEnd()


def async_error(check: Callable[[], object], kind: type[Exception]) -> int:
    """Get the code that CuPy's `check_async_error` raises, 0 when it raises nothing.

    CuPy (14.2) makes its exception from a table that has no codes above 6, so that 7 (in
    progress) and 8 (timeout) come as a KeyError.
    """
    try:
        check()
    except kind as error:
        return int(error.status)  # type: ignore[attr-defined]
    except KeyError as error:
        return int(error.args[0])
    return 0


class _TranslatedErrors:
    """Translates CuPy's exceptions for NCCL to `BackendError`; has no state of its own."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, nccl.NcclError):
            raise BackendError(f"NCCL refused: {error}", code=error.status) from error
        if isinstance(error, KeyError) and error.args and isinstance(error.args[0], int):
            code = error.args[0]
            raise BackendError(f"NCCL refused with code {code}", code=code) from error


_translated_errors = _TranslatedErrors()
