"""Mappings of shared memory, which can be given back although arrays still view them.

`mmap.mmap` keeps the memory, and a descriptor of the file, as long as any view lives, and after a failure the frames of
the error hold views. So this module maps by itself.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import re
import weakref
from functools import lru_cache

import numpy as np

_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_NORESERVE = 0x4000  # Python 3.11 does not name it, nor those of mremap
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_FAILED = ctypes.c_void_p(-1).value
_IN_THIS_PACKAGE = re.compile(r'/ferro_gloo/shm/\w+\.py", line')  # not in the packages within it


class Mapping:
    """A file's memory, mapped until it is released or its last view is gone.

    Attributes:
        memory: the bytes. Views stay valid after `release`, and then see memory that is nobody else's.
    """

    def __init__(self, descriptor: int, nbytes: int) -> None:
        """Map the beginning of a file; raise OSError if that fails."""
        self._address = _map(nbytes, mmap.MAP_SHARED, descriptor)
        self._nbytes = nbytes
        self._released = False
        array = (ctypes.c_ubyte * nbytes).from_address(self._address)
        weakref.finalize(array, _libc().munmap, self._address, nbytes).atexit = False
        self.memory: memoryview = np.frombuffer(memoryview(array), np.uint8).data

    def advise(self, advice: int, offset: int, nbytes: int) -> None:
        """Call madvise for a part of the memory; raise OSError if that fails."""
        if _libc().madvise(self._address + offset, nbytes, advice) != 0:
            raise _error()

    def release(self) -> None:
        """Put empty memory of this process in place of the shared memory. Idempotent.

        Where the system refuses, the shared memory is given back with its last view.
        """
        if self._released:
            return
        self._released = True
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            empty = _map(self._nbytes, flags, -1)
        except OSError:
            return
        moved = _libc().mremap(empty, self._nbytes, self._nbytes, _MREMAP_MAYMOVE | _MREMAP_FIXED, self._address)
        if moved == _FAILED:
            _libc().munmap(empty, self._nbytes)


def is_used_by_other_threads() -> bool:
    """Return True if another thread is in a collective, which may still read shared memory.

    The interpreter itself lists the stacks, while no thread goes on. Python code that follows `f_back` of threads that
    go on may find a frame that is no more, and Python 3.11 ends with a segmentation fault then (python/cpython#99110).
    """
    try:
        with open(os.memfd_create("ferro-stacks"), "r+b", buffering=0) as listed:
            faulthandler.dump_traceback(listed.fileno(), all_threads=True)
            listed.seek(0)
            text = listed.read().decode("ascii", "replace")
    except OSError:
        return True  # nobody knows, and the memory goes with its last view
    stacks = text.split("\n\n")
    is_cut = "\n...\n" in text  # there are more threads than it lists
    return is_cut or any(_IN_THIS_PACKAGE.search(stack) for stack in stacks if not stack.startswith("Current thread"))


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = (pointer, size, number, number, number, ctypes.c_long)
    libc.mremap.argtypes = (pointer, size, size, number, pointer)
    libc.mmap.restype = libc.mremap.restype = pointer
    libc.munmap.argtypes = (pointer, size)
    libc.madvise.argtypes = (pointer, size, number)
    return libc


def _map(nbytes: int, flags: int, descriptor: int) -> int:
    address: int | None = _libc().mmap(None, nbytes, _PROTECTION, flags, descriptor, 0)
    if address is None or address == _FAILED:
        raise _error()
    return address


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
