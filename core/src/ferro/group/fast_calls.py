"""FastCalls: the fast paths of a group's calls, remembered by what was checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from ferro.arrays import dtype_problem
from ferro.collectives.fast_path import EvenCollective, FastPath, FastScatter
from ferro.collectives.label import array_call
from ferro.collectives.reduction import reduction_for
from ferro.errors import UnsupportedError, UsageError
from ferro.group.array_operations import BARRIER, Op
from ferro.group.uneven import HEADER_BYTES, header_of, split_layout
from ferro.types import Array

if TYPE_CHECKING:
    from ferro.group.dispatcher import Dispatcher

_MOST = 512  # kinds of calls that are remembered

_ndarray, _empty = np.ndarray, np.empty  # globals, since each call looks them up

NOT_TAKEN: Final = object()  # the answer of a fast path that leaves a call to the ordinary one
Kind: TypeAlias = tuple[np.dtype, tuple[int, ...]]  # dtype and shape of an input
Path: TypeAlias = FastPath | FastScatter
Shapes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
Failed: TypeAlias = Callable[[str, BaseException], object]
NOTHING = np.empty(0, np.uint8)  # what a barrier moves


def even_collective(
    op: str, dtype: np.dtype, shape: tuple[int, ...], reduction: Op | None, root: int, ranks: int
) -> tuple[EvenCollective, tuple[int, ...]] | None:
    """Describe a collective on NumPy arrays, and the shape of its result; None where no fast path can run it.

    `dtype` and `shape` are those of the input, in a scatter of the whole array; `reduction` is as the user names it.
    """
    if dtype_problem(dtype) or not -1 <= root < ranks:
        return None
    try:
        reduced = None if reduction is None else reduction_for(reduction, dtype, ranks)
    except (UsageError, UnsupportedError):
        return None  # the ordinary path says what is wrong
    if reduced is not None and reduced.op is None:
        return None
    rows = shape[0] if shape else 1
    if op in ("all_gather", "gather"):
        result = (ranks * rows, *shape[1:])
    elif op in ("reduce_scatter", "scatter", "all_to_all"):
        if not shape or rows % ranks:
            return None
        result = shape if op == "all_to_all" else (rows // ranks, *shape[1:])
    else:
        result = shape
    count = math.prod(shape)
    if op in ("reduce_scatter", "scatter", "all_to_all"):
        count //= ranks
    call = BARRIER if op == "barrier" else array_call(op, dtype, shape, "" if reduced is None else reduced.name, root)
    return EvenCollective(op=op, call=call, dtype=dtype, count=count, reduction=reduced, root=root), result


class _FastCall:
    """The fast path of calls of one kind: input arrays of one dtype and shape."""

    __slots__ = ("_dtype", "_has_result", "_in_place", "_interrupted", "_is_source", "_path", "_shape")

    def __init__(self, path: Path, collective: EvenCollective, shapes: Shapes, here: bool, failed: Failed) -> None:
        """Prepare calls with inputs of one shape and results of another; `here` is true where no root is elsewhere."""
        one_way, moves = collective.op in ("broadcast", "scatter"), collective.op != "barrier"
        self._path = path
        self._interrupted = partial(failed, collective.op)
        self._dtype = collective.dtype
        self._shape = shapes[1]
        self._is_source = moves and (here or not one_way)
        self._has_result = moves and (here or one_way)
        self._in_place = shapes[0] == shapes[1]

    def __call__(self, x: Array, out: Any) -> object:
        if not self._has_result:
            if out is not None:
                return NOT_TAKEN
        elif out is None:
            out = _empty(self._shape, self._dtype)
        elif not (out is x and self._in_place) and (
            type(out) is not _ndarray
            or (out.dtype is not self._dtype and out.dtype != self._dtype)
            or out.shape != self._shape
        ):
            return NOT_TAKEN
        try:
            done = self._path(x if self._is_source else None, out)
            return out if done is True else done or NOT_TAKEN
        except BaseException as error:  # it may have left the call in the middle
            self._interrupted(error)
            raise


def _decline(x: Array, out: object) -> object:
    return NOT_TAKEN


class FastCalls:
    """The fast paths of one group, made when a kind of call comes for the second time."""

    def __init__(self, dispatcher: Dispatcher, rank: int, world_size: int) -> None:
        self._dispatcher = dispatcher
        self._rank = rank
        self._world_size = world_size
        self.blocks: dict[int, Kind] = {}  # what this rank got last in an ordinary scatter, by root
        self._calls: dict[tuple[object, ...], Callable[[Any, Any], object]] = {}
        self._seen: set[tuple[object, ...]] = set()

    def barrier(self) -> bool:
        """Return False; later calls find the bound fast path of barriers, which runs one, in this method's place."""
        if self._dispatcher.is_indirect():
            return False
        found = even_collective("barrier", NOTHING.dtype, NOTHING.shape, None, -1, self._world_size)
        path = None if found is None else self._dispatcher.fast_path(found[0])
        if bound := path and path.bind(None, None):
            self.barrier = bound  # type: ignore[method-assign] # without another call between
        return False

    def scatter(self, x: Any, root: int, out: Any) -> object:
        """Run a scatter, with its header; return its result, NOT_TAKEN, or the bytes of a header that was told alone.

        Ranks other than the root expect a block like `out`, or like the last one.
        """
        if type(root) is not int:
            return NOT_TAKEN
        array = x if self._rank == root else out
        if type(array) is not _ndarray and (array is not None or self._rank == root):
            return NOT_TAKEN
        if array is not None:
            key = ("scatter", array.dtype, array.shape, None, root)
        elif root in self.blocks:
            key = ("scatter", *self.blocks[root], None, root)
        else:
            return NOT_TAKEN
        return (self._calls.get(key) or self._learn(key))(array, out)

    def run(self, op: str, x: Any, reduction: Any, root: int, out: object) -> object:
        """Run a collective; return its result, or NOT_TAKEN.

        A call is of a kind that was checked if operation, dtype, shape, reduction and root are the same. The fast path
        itself checks the buffers.
        """
        if type(x) is not _ndarray or type(root) is not int:
            return NOT_TAKEN
        key = (op, x.dtype, x.shape, reduction, root)
        try:
            call = self._calls.get(key)
        except TypeError:  # a reduction that cannot be hashed
            return NOT_TAKEN
        return (call or self._learn(key))(x, out)

    def _learn(self, key: tuple[Any, ...]) -> Callable[[Any, Any], object]:
        """Remember that a kind of call has come, and its fast path when it comes again."""
        if key[3] is not None and not isinstance(key[3], str):  # a function, which would be kept
            return _decline
        if key not in self._seen:
            if len(self._seen) >= _MOST:
                self._seen.clear()
                self._calls.clear()
            self._seen.add(key)
            return _decline
        call = self._calls[key] = self._fast_call(*key)
        return call

    def _fast_call(
        self, op: str, dtype: np.dtype, shape: tuple[int, ...], reduction: Any, root: int
    ) -> Callable[[Any, Any], object]:
        if op in ("reduce", "broadcast", "gather", "scatter") and root < 0:
            return _decline
        n, here, whole = self._world_size, self._rank == root or root < 0, shape
        if op == "scatter" and shape and not here:
            whole = (shape[0] * n, *shape[1:])
        found = even_collective(op, dtype, whole, reduction, root, n)
        if found is None or self._dispatcher.is_indirect():
            return _decline
        backend, turn = self._dispatcher.backend, self._dispatcher.turn()
        path: Path | None = None
        if op != "scatter":
            path = backend.fast_path(found[0], turn)
        elif len(told := header_of(dtype, split_layout(whole, None, n, op))) == HEADER_BYTES:
            header = even_collective("broadcast", NOTHING.dtype, (HEADER_BYTES,), None, root, n)
            path = backend.fast_scatter(header[0], told, found[0], turn) if header else None
        if path is None:
            return _decline
        # A bound method is called quicker than an object.
        return _FastCall(path, found[0], (shape, found[1]), here, self._dispatcher.interrupted).__call__
