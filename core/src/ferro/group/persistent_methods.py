"""The method of a group that makes persistent operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ferro.collectives.fast_path import BoundFastPath, EvenCollective
from ferro.collectives.label import Call, persistent_call
from ferro.group.array_operations import Operation, no_result
from ferro.group.dispatcher import Dispatcher
from ferro.group.fast_calls import even_collective
from ferro.group.object_methods import ObjectMethods
from ferro.group.persistent import FastSteps, NativeSteps, PersistentOperation, RepeatedSteps
from ferro.group.persistent_arguments import PersistentArguments, read_arguments
from ferro.group.persistent_transfers import persistent_exchange, persistent_transfer
from ferro.types import Device

_ROOTED = ("broadcast", "scatter", "reduce", "gather")
_WITHOUT_FAST_PATH = ("scan", "exscan", "min_loc", "max_loc")


class PersistentMethods(ObjectMethods):
    """The part of `ProcessGroup` that makes persistent operations."""

    _persistent_count = 0

    def persistent(self, op: str, /, *args: Any, timeout_s: float | None = None, **options: Any) -> PersistentOperation:
        """Make a collective or transfer that is checked once and then runs many times: see `PersistentOperation`.

        Every rank calls it, as a collective: the ranks compare what they ask for. Only "send", "recv" and "sendrecv"
        are made by the two ranks that take part, which compare each message.

        Args:
            op: name of a method of the group: any collective on arrays, "barrier", "send", "recv", "sendrecv" or
                "exchange".
            args, options: the arguments of that method; not `async_op` and `copy`. Each step reads the elements that
                the input has then. Without `out` the result is an array that the next step overwrites.
            timeout_s: deadline of each step in seconds; the group's when None.

        Raises:
            UsageError, UnsupportedError: as the method; nothing was sent.
            CollectiveMismatch, CollectiveTimeout, PeerLost, GroupClosed: as all collectives.
        """
        self._dispatcher.check_open("persistent")
        timeout_s = self._dispatcher.checked_timeout(timeout_s)
        if op in ("send", "recv", "sendrecv"):
            return persistent_transfer(self, op, args, options, timeout_s)
        if op == "exchange":
            return persistent_exchange(self, self._next_persistent, args, options, timeout_s)
        arguments = read_arguments(self, op, args, options)
        operation: Operation = arguments.prepare(arguments.out)
        agreed, number = operation[0], self._next_persistent()
        call = persistent_call(agreed, number)
        result = None if not arguments.even and op == "all_to_all" else operation[2]()
        even, buffers = self._even_collective(op, arguments, call, result)
        dispatcher, made = self._dispatcher, list[BoundFastPath | None]()

        def agree(*, deadline: float) -> None:
            self._backend.barrier(deadline=deadline)
            if op in _ROOTED:
                turn = dispatcher.turn(timeout_s)
                made.append(self._backend.persistent_collective(even, buffers, turn, number=number, deadline=deadline))

        detail = ", ".join(filter(None, (f"{agreed.op} {number}", agreed.detail)))
        asked = Call("persistent", 0, agreed.dtype, agreed.count, agreed.reduction, agreed.root, detail)
        dispatcher.collective(asked, agree, no_result, 0, Device.CPU, False, None)
        if made and made[0] is not None:
            native = NativeSteps(op, dispatcher, made[0], made[0].__call__, made[0].finish, result=result)
            return PersistentOperation(op, native)
        ordinary = RepeatedSteps(_ordinary_step(dispatcher, arguments, (call, *operation[1:]), result, timeout_s))
        path = None if even is None else dispatcher.fast_path(even, timeout_s)
        bound = None if path is None else path.bind(*buffers)
        steps = ordinary if bound is None else FastSteps(op, dispatcher, bound, ordinary, result)
        return PersistentOperation(op, steps)

    def _next_persistent(self) -> int:
        """Number a persistent operation whose arguments are right on this rank, as they are on all."""
        self._persistent_count += 1
        return self._persistent_count

    def _even_collective(
        self, op: str, arguments: PersistentArguments, call: Call, result: Any
    ) -> tuple[EvenCollective | None, tuple[Any, Any]]:
        """Describe a step that a backend may run in its own way, if it may, and its buffers."""
        x, root = arguments.x, arguments.root
        buffers = None if op in ("broadcast", "scatter") and self.rank != root else x, result
        like = result if x is None else x
        plain = all(array is None or type(array) is np.ndarray for array in (x, result))
        if self._dispatcher.is_indirect() or op in _WITHOUT_FAST_PATH or not (arguments.even and plain):
            return None, buffers
        shape, dtype = ((0,), np.dtype(np.uint8)) if like is None else (like.shape, like.dtype)
        if op == "scatter" and x is None:
            shape = (shape[0] * self.world_size, *shape[1:])
        found = even_collective(op, dtype, shape, arguments.reduction, int(root), self.world_size)
        return None if found is None else replace(found[0], call=call), buffers


def _ordinary_step(
    dispatcher: Dispatcher, arguments: PersistentArguments, operation: Operation, result: object, timeout_s: float
) -> Callable[[bool], Any]:
    """Make the function, of `async_op`, that runs a step as an ordinary operation."""
    out = result if arguments.out is None else arguments.out
    repeated = operation if arguments.repeats() else None

    def run(async_op: bool) -> Any:
        # Otherwise the arrays are a library's that must be asked for their memory again.
        step = repeated or (operation[0], *arguments.prepare(out)[1:])
        return dispatcher.collective(*step, async_op, timeout_s)

    return run
