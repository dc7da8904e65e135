"""Streams, events and arrays, each with the names that CuPy gives them."""

from __future__ import annotations

import itertools
import queue
import threading
from types import SimpleNamespace

import numpy as np

NOT_READY = 600
_numbers = itertools.count(1000)


class CUDARuntimeError(RuntimeError):
    def __init__(self, status):
        super().__init__(f"cudaError {status}")
        self.status = status


class Stream:
    """Carries out what is put on it in order, in a thread of its own."""

    def __init__(self, machine, device):
        self.ptr = next(_numbers)
        self.device_id = device
        self._machine = machine
        self._work = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        machine.streams[self.ptr] = self

    def put(self, work):
        self._work.put(work)

    def record(self, event):
        event._happened = threading.Event()
        self.put(event._happened.set)

    def wait_event(self, event):
        if event._happened is not None:  # the moment that it means now, whatever it means later
            self.put(event._happened.wait)

    def synchronize(self):
        ended = threading.Event()
        self.put(ended.set)
        assert ended.wait(20), "a stream does not end"

    def __enter__(self):
        assert self._machine.here.device == self.device_id, "a stream of another device"
        self._machine.stack(self.device_id).append(self)
        return self

    def __exit__(self, *_):
        assert self._machine.stack(self.device_id).pop() is self

    def stop(self):
        self.put(None)

    def join(self):
        self._thread.join(10)
        assert not self._thread.is_alive(), "a stream is stuck"

    def _run(self):
        while (work := self._work.get()) is not None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - a test looks at it
                self._machine.faults.append(error)
            del work


class Event:
    def __init__(self, machine):
        self.ptr = next(_numbers)
        self._happened = None
        machine.events[self.ptr] = self


class Array:
    """The used part of cupy.ndarray; arithmetic happens on the current stream."""

    __module__ = "cupy"
    machine = None  # the one whose array it is, set by a subclass

    def __init__(self, block, view):
        self._block = block
        self._view = view
        self.dtype, self.shape, self.ndim = view.dtype, view.shape, view.ndim
        self.size, self.nbytes, self.itemsize = view.size, view.nbytes, view.itemsize
        self.flags = SimpleNamespace(c_contiguous=view.flags.c_contiguous)
        address = view.__array_interface__["data"][0]
        self.data = SimpleNamespace(ptr=address, device_id=block.device)

    def __getitem__(self, key):
        return type(self)(self._block, self._view[key])

    def __setitem__(self, key, value):
        target, source = self._view[key], self._plain(value)
        self._launch(lambda: np.copyto(target, source(), casting="unsafe"), self._block)

    def reshape(self, *shape):
        return type(self)(self._block, self._view.reshape(*shape))

    def copy(self):
        return self.astype(self.dtype)

    def astype(self, dtype):
        made = self.machine.empty(self.shape, dtype)
        made[...] = self
        return made

    def __itruediv__(self, other):
        return np.true_divide(self, other, out=self)

    def __dlpack__(self):
        raise NotImplementedError

    def __dlpack_device__(self):
        return 2, self.data.device_id

    def __array_ufunc__(self, ufunc, method, *inputs, out=None):
        assert method == "__call__"
        sources = [self._plain(value) for value in inputs]
        if out is None:
            kinds = [i._view[:0] if isinstance(i, Array) else i for i in inputs]
            out = (self.machine.empty(self.shape, ufunc(*kinds).dtype),)
        target = out[0]._view
        self._launch(lambda: ufunc(*(source() for source in sources), out=target), out[0]._block)
        return out[0]

    def __array_function__(self, function, types, args, kwargs):
        if function is not np.may_share_memory:
            return NotImplemented
        return np.may_share_memory(*(a._view if isinstance(a, Array) else a for a in args))

    def _plain(self, value):
        """Make a function that reads the operand when the stream comes to it."""
        if isinstance(value, Array):
            return lambda: value._view
        kept = np.array(value)
        return lambda: kept

    def _launch(self, work, block):
        def run():
            assert block is not None  # kept until here
            work()

        self.machine.current_stream().put(run)
