"""A stand-in for libucc among threads, which checks what it is given as UCC would.

Only what `ferro_ucc.library.UccLibrary` offers is imitated. Ranks share memory here, so whoever posts
an operation last carries it out for all. As UCC may, a reduction takes another order on each rank.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from ferro.errors import BackendError
from ferro_ucc import abi
from ferro_ucc.abi import CollType, UccDatatype, UccOp, UccStatus

_TYPES = {code: np.dtype(code.name.lower()) for code in UccDatatype}
_UFUNCS = {
    UccOp.SUM: np.add,
    UccOp.PROD: np.multiply,
    UccOp.MAX: np.maximum,
    UccOp.MIN: np.minimum,
    UccOp.BAND: np.bitwise_and,
    UccOp.BOR: np.bitwise_or,
    UccOp.BXOR: np.bitwise_xor,
}
_REDUCING = (CollType.ALL_REDUCE, CollType.REDUCE, CollType.REDUCE_SCATTER_V)


@dataclass
class Post:
    """One rank's side of an operation."""

    args: abi.CollArgs
    status: ctypes.c_int32 = field(default_factory=lambda: ctypes.c_int32(UccStatus.INITIALIZED))
    place: tuple[int, int] = (0, 0)
    rank: int = 0
    ranks: int = 0


@dataclass
class Network:
    """What the ranks share: operations that wait for more of them, by team and number."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: dict[tuple[int, int], dict[int, Post]] = field(default_factory=dict)


@dataclass
class _Team:
    params: abi.TeamParams
    request: ctypes.c_void_p
    members: ctypes.Array[ctypes.c_char]
    made: bool = False
    operations: int = 0


class StandIn:
    """One rank's libucc."""

    version = (1, 8, 0)

    def __init__(self, network: Network, *, has_gather: bool = True) -> None:
        self.has_gather = has_gather
        self.closed = False
        self.misuse: list[str] = []
        self._network = network
        self._teams: dict[int, _Team] = {}
        self._posts: dict[int, Post] = {}

    def progress(self, context: ctypes.c_void_p) -> int:
        assert context.value == 1
        return UccStatus.OK

    def status(self, name: str, *arguments: object) -> int:
        status = getattr(self, "_" + name.removeprefix("ucc_"))(*arguments)
        if status < 0:
            raise self.error(status, name)
        return int(status)

    def release(self, name: str, config: ctypes.c_void_p) -> None:
        assert name.endswith("_config_release")

    def error(self, status: int, what: str) -> BackendError:
        return BackendError(f"stand-in: {what} failed with {status}", code=status)

    def _lib_config_read(self, prefix, file, config) -> int:
        assert prefix is None
        assert file is None
        return UccStatus.OK

    def _init_version(self, major, minor, params, config, lib) -> int:
        assert (major, minor) == (1, 8)
        assert (params._obj.mask, params._obj.thread_mode) == (1, 0)
        lib._obj.value = 1
        return UccStatus.OK

    def _context_config_read(self, lib, file, config) -> int:
        assert lib.value == 1
        return UccStatus.OK

    def _context_create(self, lib, params, config, handle) -> int:
        assert params._obj.mask == abi.CONTEXT_FIELD_TYPE | abi.CONTEXT_FIELD_OOB
        oob = params._obj.oob
        addresses = ctypes.create_string_buffer(4 * oob.n_oob_eps)
        request = ctypes.c_void_p()
        oob.allgather(oob.oob_ep.to_bytes(4), addresses, 4, None, ctypes.byref(request))
        while (status := oob.req_test(request)) == UccStatus.IN_PROGRESS:
            continue
        if status != UccStatus.OK:
            return status
        oob.req_free(request)
        assert addresses.raw == b"".join(rank.to_bytes(4) for rank in range(oob.n_oob_eps))
        handle._obj.value = 1
        return UccStatus.OK

    def _team_create_post(self, contexts, number, params, handle) -> int:
        assert (contexts._obj.value, number) == (1, 1)
        mine = abi.TeamParams.from_buffer_copy(params._obj)
        fields = abi.TEAM_FIELD_EP | abi.TEAM_FIELD_EP_RANGE
        assert mine.mask == fields | abi.TEAM_FIELD_OOB | abi.TEAM_FIELD_ID
        assert mine.ep == mine.oob.oob_ep < mine.oob.n_oob_eps
        assert 0 < mine.id <= abi.MAX_TEAM_ID
        members = ctypes.create_string_buffer(mine.oob.n_oob_eps)
        team = _Team(mine, ctypes.c_void_p(), members)
        mine.oob.allgather(bytes([mine.ep]), members, 1, None, ctypes.byref(team.request))
        handle._obj.value = len(self._teams) + 1
        self._teams[handle._obj.value] = team
        return UccStatus.OK

    def _team_create_test(self, handle) -> int:
        team = self._teams[handle.value]
        status = team.params.oob.req_test(team.request)
        if status == UccStatus.OK:
            team.params.oob.req_free(team.request)
            assert team.members.raw == bytes(range(len(team.members)))
            team.made = True
        return int(status)

    def _team_destroy(self, handle) -> int:
        assert self._teams[handle.value].made
        place = self._teams[handle.value].params.id
        if any(post.place[0] == place for post in self._posts.values()):
            self.misuse.append("a team was destroyed with an operation under way")
        self._teams[handle.value].made = False
        return UccStatus.OK

    def _collective_init(self, args, request, handle) -> int:
        team = self._teams[handle.value]
        assert team.made
        assert args._obj.mask == abi.ARGS_FIELD_FLAGS
        post = Post(abi.CollArgs.from_buffer_copy(args._obj))
        post.place = (team.params.id, team.operations)
        post.rank, post.ranks = team.params.ep, team.params.oob.n_oob_eps
        team.operations += 1
        request._obj.value = ctypes.addressof(post.status)
        self._posts[request._obj.value] = post
        return UccStatus.OK

    def _collective_post(self, request) -> int:
        post = self._posts[request.value]
        post.status.value = UccStatus.IN_PROGRESS
        network = self._network
        with network.lock:
            here = network.waiting.setdefault(post.place, {})
            here[post.rank] = post
            if len(here) < post.ranks:
                return UccStatus.OK
            del network.waiting[post.place]
        carry_out([here[rank] for rank in range(post.ranks)])
        for other in here.values():
            other.status.value = UccStatus.OK
        return UccStatus.OK

    def _collective_finalize(self, request) -> int:
        assert self._posts.pop(request.value).status.value == UccStatus.OK
        return UccStatus.OK

    def _context_destroy(self, handle) -> int:
        if any(team.made for team in self._teams.values()):
            self.misuse.append("the context was destroyed before its teams")
        if self._posts:
            self.misuse.append("the context was destroyed with operations under way")
        self.closed = True
        return UccStatus.OK

    def _finalize(self, lib) -> int:
        return UccStatus.OK


def carry_out(posts: Sequence[Post]) -> None:
    """Do what all ranks posted."""
    args = [post.args for post in posts]
    kind = CollType(args[0].coll_type)
    for what in ("coll_type", "op", "root"):
        assert len({getattr(one, what) for one in args}) == 1, f"ranks differ in {what}"
    {
        CollType.ALL_GATHER: _all_gather,
        CollType.ALL_GATHER_V: _all_gather,
        CollType.ALL_TO_ALL_V: _all_to_all,
        CollType.BROADCAST: _broadcast,
        CollType.GATHER_V: _gather,
        CollType.SCATTER_V: _scatter,
        CollType.ALL_REDUCE: _all_reduce,
        CollType.REDUCE: _reduce,
        CollType.REDUCE_SCATTER_V: _reduce_scatter,
    }[kind](args)


def _whole(side: abi.CollBuffer) -> np.ndarray:
    info = side.info
    assert info.mem_type == abi.MEMORY_HOST
    dtype = _TYPES[UccDatatype(info.datatype)]
    memory = (ctypes.c_uint8 * (info.count * dtype.itemsize)).from_address(info.buffer)
    return np.frombuffer(memory, dtype)


def _blocks(side: abi.CollBuffer, ranks: int) -> list[np.ndarray]:
    info = side.info_v
    assert info.mem_type == abi.MEMORY_HOST
    dtype = _TYPES[UccDatatype(info.datatype)]
    counts = list((ctypes.c_uint64 * ranks).from_address(info.counts))
    starts = list((ctypes.c_uint64 * ranks).from_address(info.displacements))
    assert starts == list(accumulate(counts[:-1], initial=0))
    memory = (ctypes.c_uint8 * (sum(counts) * dtype.itemsize)).from_address(info.buffer)
    whole = np.frombuffer(memory, dtype)
    return [whole[start:][:count] for start, count in zip(starts, counts, strict=True)]


def _wide(args: abi.CollArgs) -> bool:
    wide = abi.ArgsFlag.COUNT_64BIT | abi.ArgsFlag.DISPLACEMENTS_64BIT
    return bool(args.flags & wide == wide)


def _in_place(args: abi.CollArgs) -> bool:
    return bool(args.flags & abi.ArgsFlag.IN_PLACE)


def _all_gather(args: Sequence[abi.CollArgs]) -> None:
    n = len(args)
    assert all(map(_in_place, args))
    if args[0].coll_type == CollType.ALL_GATHER:
        tables = [list(_whole(one.dst).reshape(n, -1)) for one in args]
    else:
        assert all(map(_wide, args))
        tables = [_blocks(one.dst, n) for one in args]
    for source in range(n):
        for target in range(n):
            tables[target][source][...] = tables[source][source]


def _all_to_all(args: Sequence[abi.CollArgs]) -> None:
    n = len(args)
    assert all(map(_wide, args))
    assert not any(map(_in_place, args))
    sent = [_blocks(one.src, n) for one in args]
    came = [_blocks(one.dst, n) for one in args]
    for source in range(n):
        for target in range(n):
            assert sent[source][target].size == came[target][source].size, "sizes disagree"
            came[target][source][...] = sent[source][target]


def _broadcast(args: Sequence[abi.CollArgs]) -> None:
    for one in args:
        _whole(one.src)[...] = _whole(args[args[0].root].src)


def _gather(args: Sequence[abi.CollArgs]) -> None:
    root = args[0].root
    assert [_in_place(one) for one in args] == [rank == root for rank in range(len(args))]
    for rank, block in enumerate(_blocks(args[root].dst, len(args))):
        if rank != root:
            assert _whole(args[rank].src).size == block.size
            block[...] = _whole(args[rank].src)


def _scatter(args: Sequence[abi.CollArgs]) -> None:
    root = args[0].root
    assert [_in_place(one) for one in args] == [rank == root for rank in range(len(args))]
    for rank, block in enumerate(_blocks(args[root].src, len(args))):
        if rank != root:
            assert _whole(args[rank].dst).size == block.size
            _whole(args[rank].dst)[...] = block


def _reduced(wholes: Sequence[np.ndarray], op: int, first: int) -> np.ndarray:
    """Reduce in an order that begins with another rank."""
    assert len({(whole.size, whole.dtype) for whole in wholes}) == 1
    ordered = [*wholes[first:], *wholes[:first]]
    result: np.ndarray = _UFUNCS[UccOp(op)].reduce(ordered, dtype=wholes[0].dtype)
    return result


def _all_reduce(args: Sequence[abi.CollArgs]) -> None:
    assert all(map(_in_place, args))
    wholes = [_whole(one.dst) for one in args]
    results = [_reduced(wholes, args[0].op, first) for first in range(len(args))]
    for whole, result in zip(wholes, results, strict=True):
        whole[...] = result


def _reduce(args: Sequence[abi.CollArgs]) -> None:
    root = args[0].root
    sides = [one.dst if rank == root else one.src for rank, one in enumerate(args)]
    wholes = [_whole(side) for side in sides]
    wholes[root][...] = _reduced(wholes, args[0].op, 1)


def _reduce_scatter(args: Sequence[abi.CollArgs]) -> None:
    n = len(args)
    assert all(map(_wide, args))
    wholes = [_whole(one.src) for one in args]
    result = _reduced(wholes, args[0].op, 1)
    for rank, one in enumerate(args):
        counts = list((ctypes.c_uint64 * n).from_address(one.dst.info_v.counts))
        assert sum(counts) == result.size
        assert UccDatatype(one.dst.info_v.datatype) == UccDatatype(one.src.info.datatype)
        nbytes = counts[rank] * result.itemsize
        memory = (ctypes.c_uint8 * nbytes).from_address(one.dst.info_v.buffer)
        start = sum(counts[:rank])
        np.frombuffer(memory, result.dtype)[...] = result[start:][: counts[rank]]
