"""cupy.cuda.nccl between threads: it checks its arguments as NCCL does, and moves the data."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import defaultdict, deque
from dataclasses import dataclass
from types import ModuleType

import ml_dtypes
import numpy as np

TYPES = dict(enumerate(map(np.dtype, ("i1", "u1", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ml_dtypes.bfloat16))))
SUM, PROD, MAX, MIN, AVG = range(5)
OPS = {SUM: np.add, PROD: np.multiply, MAX: np.maximum, MIN: np.minimum, AVG: np.add}
KNOWN_CODES = range(7)  # the codes in CuPy's table of messages


class NcclError(RuntimeError):
    def __init__(self, status):
        if status not in KNOWN_CODES:
            raise KeyError(status)
        super().__init__(f"NCCL_ERROR {status}")
        self.status = status


@dataclass(frozen=True)
class Call:
    """One call on one rank; `alike` must be the same on all."""

    kind: str
    count: int
    dtype: int
    op: int = 0
    peer: int = -1
    source: int = 0
    target: int = 0

    @property
    def alike(self):
        return self.kind, self.count, self.dtype, self.op, self.peer

    @property
    def p2p(self):
        return self.kind in ("send", "recv")


class Nccl:
    """The module, for one machine."""

    def __init__(self, machine, version):
        self.machine = machine
        self.version = version
        self.several_on_a_gpu = False
        self.communicators = []
        self.calls = []  # (rank, kind) of all calls
        self._numbers = itertools.count()
        self._worlds = {}
        self._lock = threading.Lock()
        self._here = threading.local()

    def module(self):
        made = ModuleType("cupy.cuda.nccl")
        made.available, made.NcclError = True, NcclError
        made.get_version = lambda: self.version
        made.get_unique_id = lambda: next(self._numbers).to_bytes(128, "big")
        made.groupStart, made.groupEnd = self.group_start, self.group_end
        made.NcclCommunicator = functools.partial(self.connect)
        return made

    def connect(self, ndev, comm_id, rank):
        assert isinstance(comm_id, bytes)
        assert len(comm_id) == 128
        with self._lock:
            world = self._worlds.setdefault(comm_id, World(self, ndev))
        return world.join(rank)

    def release(self):
        for communicator in self.communicators:
            communicator.world.end(communicator)

    @property
    def depth(self):
        return getattr(self._here, "depth", 0)

    def group_start(self):
        if not self.depth:
            self._here.group = []
        self._here.depth = self.depth + 1

    def group_end(self):
        if not self.depth:
            raise NcclError(5)
        self._here.depth -= 1
        if not self._here.depth:
            by_communicator = defaultdict(list)
            for communicator, call, stream in self._here.group:
                by_communicator[communicator].append((call, stream))
            for communicator, several in by_communicator.items():
                assert len({stream for _, stream in several}) == 1, "one group, several streams"
                communicator.launch([call for call, _ in several], several[0][1])

    def add(self, communicator, call, stream):
        if self.depth:
            self._here.group.append((communicator, call, stream))
        else:
            communicator.launch([call], stream)


class Communicator:
    """One rank's end."""

    def __init__(self, world, rank, device):
        self.world, self.rank, self.device = world, rank, device
        self.error = 0  # the async error that a test sets
        self.over = ""  # "aborted" or "destroyed"
        self.pending = 0
        self.stuck_in_abort = None
        self._nccl = world.nccl
        self._stream = None
        self._nccl.communicators.append(self)

    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):
        self._call("all_reduce", count, datatype, stream, op, -1, sendbuf, recvbuf)

    def reduce(self, sendbuf, recvbuf, count, datatype, op, root, stream):
        self._call("reduce", count, datatype, stream, op, root, sendbuf, recvbuf)

    def broadcast(self, sendbuff, recvbuff, count, datatype, root, stream):
        self._call("broadcast", count, datatype, stream, 0, root, sendbuff, recvbuff)

    def reduceScatter(self, sendbuf, recvbuf, recvcount, datatype, op, stream):
        self._call("reduce_scatter", recvcount, datatype, stream, op, -1, sendbuf, recvbuf)

    def allGather(self, sendbuf, recvbuf, count, datatype, stream):
        self._call("all_gather", count, datatype, stream, 0, -1, sendbuf, recvbuf)

    def send(self, sendbuf, count, datatype, peer, stream):
        self._call("send", count, datatype, stream, 0, peer, sendbuf, 0)

    def recv(self, recvbuf, count, datatype, peer, stream):
        self._call("recv", count, datatype, stream, 0, peer, 0, recvbuf)

    def check_async_error(self):
        assert not self.over, f"used after it was {self.over}"
        if self.error:
            raise NcclError(self.error)

    def commSplit(self, color, key):
        self._usable()
        assert not self.pending, "split with operations under way"
        return self.world.split(self, color, key)

    def abort(self):
        assert not self.over, f"aborted after it was {self.over}"
        self.world.end(self)
        self.over = "aborted"

    def destroy(self):
        assert not self.over, f"destroyed after it was {self.over}"
        assert not self.pending, "destroyed with operations under way"
        self.over = "destroyed"

    def launch(self, calls, stream):
        self.pending += 1

        def run():
            try:
                self.world.carry_out(self, calls)
            finally:
                self.pending -= 1

        self._nccl.machine.streams[stream].put(run)

    def view(self, address, count, dtype):
        data = self._nccl.machine.memory.view(address, count * TYPES[dtype].itemsize, (self.device,))
        return data.view(TYPES[dtype])

    def _usable(self):
        if self.over:
            raise NcclError(4)

    def _call(self, kind, count, dtype, stream, op, peer, source, target):
        self._usable()
        call = Call(kind, count, dtype, op, peer, source, target)
        n = self.world.size
        good = dtype in TYPES and op in OPS and -1 <= peer < n and count > 0
        good = good and not (call.p2p and peer == self.rank)
        if kind in ("broadcast", "reduce", "send", "recv"):
            good = good and peer >= 0
        good = good and self._nccl.machine.here.device == self.device
        if not good:
            raise NcclError(4)
        sizes = {"all_gather": (1, n), "reduce_scatter": (n, 1)}.get(kind, (1, 1))
        try:
            for address, times in zip((source, target), sizes, strict=True):
                if address:
                    self.view(address, count * times, dtype)
        except MemoryError:
            raise NcclError(4) from None
        assert self._stream in (None, stream), "a communicator on several streams"
        self._stream = stream
        self._nccl.calls.append((self.rank, kind))
        self._nccl.add(self, call, stream)


class World:
    """The ranks of one communicator."""

    def __init__(self, nccl, size):
        self.nccl, self.size = nccl, size
        self.members = {}
        self._change = threading.Condition()
        self._numbers = defaultdict(int)
        self._slots = defaultdict(dict)
        self._done = set()
        self._messages = defaultdict(deque)
        self._splits = defaultdict(dict)
        self._parts = {}

    def join(self, rank):
        device = self.nccl.machine.here.device
        with self._change:
            assert rank not in self.members, "a rank twice"
            self.members[rank] = Communicator(self, rank, device)
            self._change.notify_all()
            if not self._change.wait_for(lambda: len(self.members) == self.size, 10):
                raise NcclError(6)
            uuids = self.nccl.machine.uuids
            used = [uuids[member.device] for member in self.members.values()]
            if len(set(used)) < self.size and not self.nccl.several_on_a_gpu:
                raise NcclError(5)
        return self.members[rank]

    def end(self, communicator):
        with self._change:
            communicator.over = communicator.over or "ended"
            self._change.notify_all()

    def split(self, communicator, color, key):
        with self._change:
            number = self._numbers["split", communicator.rank]
            self._numbers["split", communicator.rank] += 1
            table = self._splits[number]
            table[communicator.rank] = (color, key)
            self._change.notify_all()
            if not self._change.wait_for(lambda: len(table) == self.size, 10):
                raise NcclError(6)
            if color < 0:
                return None
            order = sorted((k, r) for r, (c, k) in table.items() if c == color)
            part = self._parts.setdefault((number, color), World(self.nccl, len(order)))
        return part.join([r for _, r in order].index(communicator.rank))

    def carry_out(self, communicator, calls):
        for call in calls:
            if not call.p2p:
                self._collective(communicator, call)
        transfers = [call for call in calls if call.p2p]
        if transfers:
            self._transfer(communicator, transfers)

    def _collective(self, communicator, call):
        with self._change:
            number = self._numbers[communicator.rank]
            self._numbers[communicator.rank] += 1
            slot = self._slots[number]
            slot[communicator.rank] = call
            if len(slot) == self.size:
                if len({c.alike for c in slot.values()}) == 1:
                    _COMPUTE[call.kind](self, slot)
                    self._done.add(number)
                else:  # NCCL waits for ever, or worse
                    self.nccl.machine.faults.append(f"ranks differ: {slot}")
                self._change.notify_all()
            self._change.wait_for(lambda: number in self._done or communicator.over)

    def _transfer(self, communicator, calls):
        me = communicator.rank
        with self._change:
            sent = []
            for call in calls:
                if call.kind == "send":
                    message = {"data": communicator.view(call.source, call.count, call.dtype)}
                    self._messages[me, call.peer].append(message)
                    sent.append(message)
            self._change.notify_all()
            for call in calls:
                if call.kind == "recv":
                    queue = self._messages[call.peer, me]
                    self._change.wait_for(lambda queue=queue: queue or communicator.over)
                    if communicator.over:
                        return
                    message = queue.popleft()
                    into = communicator.view(call.target, call.count, call.dtype)
                    if into.nbytes != message["data"].nbytes:
                        self.nccl.machine.faults.append(f"{call} gets {message['data'].nbytes}")
                    else:
                        into[...] = message["data"].view(into.dtype)
                    message["taken"] = True
                    self._change.notify_all()
            self._change.wait_for(lambda: all("taken" in message for message in sent) or communicator.over)

    def _each(self, slot, which, times=1):
        """Return every rank's memory of one kind, by rank."""
        return [
            self.members[rank].view(getattr(call, which), call.count * times, call.dtype)
            for rank, call in sorted(slot.items())
        ]

    def _total(self, slot, times=1):
        """Return the reduction. For AVG every rank's numbers are divided first, as NCCL does."""
        operands, call = self._each(slot, "source", times), slot[0]
        dtype = operands[0].dtype
        if dtype.itemsize == 2:
            operands = [operand.astype("f4") for operand in operands]
        if call.op == AVG:
            share = operands[0].dtype.type(1 / len(operands))
            operands = [operand * share for operand in operands]
        return functools.reduce(OPS[call.op], operands).astype(dtype)

    def _all_reduce(self, slot):
        total = self._total(slot)
        for target in self._each(slot, "target"):
            target[...] = total

    def _reduce(self, slot):
        root, total = slot[0].peer, self._total(slot)
        self._each({root: slot[root]}, "target")[0][...] = total

    def _broadcast(self, slot):
        root = slot[0].peer
        data = self._each({root: slot[root]}, "source")[0].copy()
        for target in self._each(slot, "target"):
            target[...] = data

    def _reduce_scatter(self, slot):
        total = self._total(slot, self.size).reshape(self.size, -1)
        for part, target in zip(total, self._each(slot, "target"), strict=True):
            target[...] = part

    def _all_gather(self, slot):
        data = np.concatenate(self._each(slot, "source"))
        for target in self._each(slot, "target", self.size):
            target[...] = data


_COMPUTE = {
    "all_reduce": World._all_reduce,
    "reduce": World._reduce,
    "broadcast": World._broadcast,
    "reduce_scatter": World._reduce_scatter,
    "all_gather": World._all_gather,
}
