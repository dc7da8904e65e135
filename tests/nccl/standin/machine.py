"""A machine's GPUs, their memory and streams, and the modules by which programs use them."""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from types import ModuleType

import numpy as np

from . import cuda
from .memory import HOST, Memory
from .nccl import Nccl


class _Here(threading.local):
    device = 0
    context = 0  # CUDA's current one: none until the thread uses a GPU

    def __init__(self):
        self.stacks = {}


class Machine:
    """Some GPUs in one process.

    Attributes:
        faults: errors of work on a stream, which no caller could be told.
        uuids: the UUIDs of its GPUs.
        contexts: GPUs on which a thread has made a context.
    """

    def __init__(self, gpus=4, version=23203):
        self.here = _Here()
        self.gpus = gpus
        self.uuids = [f"{index:016d}".encode() for index in range(gpus)]
        self.memory = Memory()
        self.faults = []
        self.contexts = set()
        self.streams = {}
        self.events = weakref.WeakValueDictionary()
        self.copies_failed = None
        self._defaults = {}
        self._lock = threading.Lock()
        self.nccl = Nccl(self, version)
        self.array_type = type("ndarray", (cuda.Array,), {"machine": self, "__module__": "cupy"})

    # -- calls of tests ----------------------------------------------------------------------------

    def install(self, monkeypatch):
        """Put it where `import cupy` finds it."""
        self.cupy = self._modules()
        for name, module in self.cupy.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "ferro_nccl.cupy_library", raising=False)

    def library(self):
        from ferro_nccl.cupy_library import CupyLibrary

        return CupyLibrary()

    def array(self, values, dtype=None):
        """Return an array on this thread's GPU, filled on its current stream."""
        values = np.asarray(values, dtype)
        made = self.empty(values.shape, values.dtype)
        made[...] = values
        return made

    def host(self, array):
        """Copy an array to the host, once this thread's current stream has done its work."""
        self.current_stream().synchronize()
        return array._view.copy()

    def block(self, stream=None):
        """Let a stream (by default this thread's current one) wait for the returned event."""
        unblock = threading.Event()
        (stream or self.current_stream()).put(lambda: unblock.wait(20))
        return unblock

    def close(self):
        """End all threads."""
        self.nccl.release()
        for stream in list(self.streams.values()):
            stream.stop()
        for stream in list(self.streams.values()):
            stream.join()

    # -- calls of CuPy -----------------------------------------------------------------------------

    def empty(self, shape, dtype=float):
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        block = self.memory.allocate(nbytes, self.here.device, self.current_stream().put)
        return self.array_type(block, block.data[:nbytes].view(dtype).reshape(shape))

    def stack(self, device):
        stack = self.here.stacks.setdefault(device, [])
        if not stack:
            with self._lock:
                if device not in self._defaults:
                    self._defaults[device] = cuda.Stream(self, device)
                stack.append(self._defaults[device])
        return stack

    def current_stream(self, device=None):
        return self.stack(self.here.device if device is None else device)[-1]

    def _pinned(self, nbytes):
        block = self.memory.allocate(nbytes, HOST, lambda free: free())
        made = (ctypes.c_ubyte * nbytes).from_buffer(block.data)
        made.block, made.ptr = block, block.start  # freed with the last view
        return made

    def _memcpy_async(self, target, source, nbytes, kind, stream):
        assert kind == 4

        def copy():
            everywhere = range(HOST, self.gpus)
            into = self.memory.view(target, nbytes, everywhere)
            into[...] = self.memory.view(source, nbytes, everywhere)

        self.streams[stream].put(copy)

    def _query(self, ptr):
        self._bind()
        event = self.events[ptr]
        assert event._happened is not None, "an event that was never recorded"
        if self.copies_failed is not None:
            return self.copies_failed
        return 0 if event._happened.is_set() else cuda.NOT_READY

    def _device_count(self):
        if not self.gpus:
            raise cuda.CUDARuntimeError(100)
        return self.gpus

    def _set_device(self, index):
        assert 0 <= index < self.gpus
        self.here.device = index
        self._bind()

    def _bind(self):
        """Make a context on this thread's GPU, as all calls do but questions about devices."""
        self.here.context = 1
        self.contexts.add(self.here.device)

    def _modules(self):
        runtime = ModuleType("cupy.cuda.runtime")
        runtime.CUDARuntimeError = cuda.CUDARuntimeError
        runtime.memcpyDefault = 4
        runtime.memcpyAsync = self._memcpy_async
        runtime.eventQuery = self._query
        runtime.getDevice = lambda: self.here.device
        runtime.setDevice = self._set_device
        runtime.getDeviceCount = self._device_count
        runtime.getDeviceProperties = lambda index: {"uuid": self.uuids[index]}
        runtime.deviceGetPCIBusId = lambda index: f"bus {self.uuids[index].decode()}"
        driver = ModuleType("cupy.cuda.driver")
        driver.ctxGetCurrent = lambda: self.here.context
        gpu = ModuleType("cupy.cuda")
        gpu.runtime, gpu.driver, gpu.nccl = runtime, driver, self.nccl.module()
        gpu.Stream = lambda non_blocking: cuda.Stream(self, self.here.device)
        gpu.Event = lambda disable_timing: cuda.Event(self)
        gpu.get_current_stream = self.current_stream
        gpu.alloc_pinned_memory = self._pinned
        top = ModuleType("cupy")
        top.cuda, top.empty, top.asnumpy, top.asarray = gpu, self.empty, self.host, self.array
        return {
            "cupy": top,
            "cupy.cuda": gpu,
            "cupy.cuda.driver": driver,
            "cupy.cuda.runtime": runtime,
            "cupy.cuda.nccl": gpu.nccl,
        }
