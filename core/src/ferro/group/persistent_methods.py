"""The method of a group that makes persistent operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from ferro.collectives.fast_path import EvenCollective, PersistentCollective
from ferro.collectives.label import Call, persistent_call
from ferro.group.array_operations import Operation, no_result
from ferro.group.dispatcher import Dispatcher
from ferro.group.fast_calls import even_collective
from ferro.group.object_methods import ObjectMethods
from ferro.group.persistent import FastSteps, NativeSteps, PersistentOperation, RepeatedSteps
from ferro.group.persistent_arguments import PersistentArguments, read_arguments
from ferro.group.persistent_transfers import persistent_exchange, persistent_transfer
from ferro.types import Device

_Even: TypeAlias = tuple[EvenCollective, Any, Any]
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
        number = self._next_persistent()
        call = persistent_call(operation[0], number)
        result = None if not arguments.even and op == "all_to_all" else operation[2]()
        even = self._even_collective(op, arguments, call, result)
        made = self._agree_on_persistent(operation[0], number, op, even, timeout_s)
        if made is not None:
            return PersistentOperation(
                op, NativeSteps(op, self._dispatcher, made, made.step, made.finish, result=result)
            )
        steps = RepeatedSteps(_ordinary_step(self._dispatcher, arguments, (call, *operation[1:]), result, timeout_s))
        path = None if even is None else self._dispatcher.fast_path(even[0], timeout_s)
        bound = None if path is None or even is None else path.bind(*even[1:])
        return PersistentOperation(op, steps if bound is None else FastSteps(bound, result, steps, self._dispatcher))

    def _next_persistent(self) -> int:
        """Number a persistent operation whose arguments are right on this rank, as they are on all."""
        self._persistent_count += 1
        return self._persistent_count

    def _agree_on_persistent(
        self, call: Call, number: int, op: str, even: _Even | None, timeout_s: float
    ) -> PersistentCollective | None:
        """Compare what all ranks ask for; return the backend's own way, for all ranks together, if there is one."""
        detail = ", ".join(filter(None, (f"{call.op} {number}", call.detail)))
        asked = Call("persistent", 0, call.dtype, call.count, call.reduction, call.root, detail)
        turn, made = self._dispatcher.turn(timeout_s), list[PersistentCollective | None]()

        def agree(*, deadline: float) -> None:
            self._backend.barrier(deadline=deadline)
            if op in _ROOTED:
                given = (None, None, None) if turn is None or even is None else even
                found = self._backend.persistent_collective(*given, turn, number=number, deadline=deadline)
                made.append(found)

        self._dispatcher.collective(asked, agree, no_result, 0, Device.CPU, False, None)
        return made[0] if made else None

    def _even_collective(self, op: str, arguments: PersistentArguments, call: Call, result: Any) -> _Even | None:
        """Describe steps that a backend may run in its own way, with their source and target; None for other ones."""
        x, root = arguments.x, arguments.root
        here = self.rank == root or root < 0
        arrays = [array for array in (x, result) if array is not None]
        if op in _WITHOUT_FAST_PATH or not arguments.even or any(type(array) is not np.ndarray for array in arrays):
            return None
        like = result if x is None else x
        shape: tuple[int, ...] = (0,) if like is None else like.shape
        if op == "scatter" and x is None:
            shape = (shape[0] * self.world_size, *shape[1:])
        dtype = np.dtype(np.uint8) if like is None else like.dtype
        found = even_collective(op, dtype, shape, arguments.reduction, int(root), self.world_size)
        source = x if here or op not in ("broadcast", "scatter") else None
        return None if found is None else (replace(found[0], call=call), source, result)


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
