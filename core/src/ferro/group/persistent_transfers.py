"""Persistent transfers: messages whose buffers are checked once, and that are sent and received many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ferro.arrays import dtype_name
from ferro.collectives.fast_path import BUSY, PersistentExchange
from ferro.collectives.label import Call
from ferro.errors import CollectiveMismatch
from ferro.group.arguments import Reads
from ferro.group.array_operations import no_result
from ferro.group.exchanged_messages import ExchangedMessages
from ferro.group.persistent import NativeSteps, PersistentOperation, RepeatedSteps
from ferro.group.persistent_arguments import bind
from ferro.group.transfers import Messages, Transfer
from ferro.types import Device

if TYPE_CHECKING:
    from ferro.group.object_methods import ObjectMethods


def persistent_transfer(
    group: ObjectMethods, op: str, args: Sequence[Any], options: dict[str, Any], timeout_s: float
) -> PersistentOperation:
    """Make a persistent send, recv or sendrecv, which repeats the ordinary call with the arrays given."""
    given = bind(op, args, options)
    if op == "sendrecv" and given["src"] is None:
        given["src"] = given["dst"]
    if not (op == "sendrecv" and given["dst"] == given["src"] == group.rank):
        for name, verb in (("dst", "send to"), ("src", "receive from")):
            if name in given:
                group._check_peer(given[name], verb, given["tag"])
    if "x" in given:
        group._checker.check_message(given["x"], copy=False)
    if "buffer" in given:
        group._checker.check_buffer(given["buffer"])
    call = partial(getattr(group, op), **given, timeout_s=timeout_s)
    asynchronous = partial(call, async_op=True, **({} if op == "recv" else {"copy": False}))
    return PersistentOperation(op, RepeatedSteps(lambda async_op: asynchronous() if async_op else call()))


def persistent_exchange(
    group: ObjectMethods, number_of: Callable[[], int], args: Sequence[Any], options: dict[str, Any], timeout_s: float
) -> PersistentOperation:
    """Make a persistent exchange, after all ranks have compared what they send with what the others receive."""
    messages = ExchangedMessages(group._checker, **bind("exchange", args, options), reads=Reads.AT_RUN)
    number, dispatcher = number_of(), group._dispatcher
    is_plain = not dispatcher.observed and messages.device is Device.CPU
    made: list[PersistentExchange | None] = []
    own = [_described(messages.sends), _described(messages.recvs), messages.tag, is_plain]
    asked = group.all_gather_object(own, timeout_s=timeout_s)

    def make(*, deadline: float) -> None:
        _compare(asked, number)
        if all(is_plain for *_, is_plain in asked):
            moved = messages.sends, messages.recvs
            made.append(group._backend.persistent_exchange(*moved, number=number, deadline=deadline))

    call = Call("persistent", detail=f"exchange {number}")
    dispatcher.collective(call, make, no_result, 0, Device.CPU, False, timeout_s)
    native = made[0] if made else None
    if native is None:
        return PersistentOperation("exchange", RepeatedSteps(partial(_run_exchange, group, messages, timeout_s)))
    moved, nothing = (messages.sends, messages.recvs, messages.tag), lambda *_: None
    described = Transfer("exchange", *moved, timeout_s, nothing, nothing)  # to name it in errors
    finish = partial(dispatcher.run_late, timeout_s, described.call, native.finish, described)

    def step(state: memoryview = dispatcher._word, move: Callable[[], bool] = native) -> bool:
        if state[BUSY]:
            return False
        if not move():
            finish()
        return True

    around = () if messages.are_plain else (messages.refill, messages.finish)
    steps = NativeSteps("exchange", dispatcher, native, step, finish, around)
    steps.has_native_progress = native.has_progress
    return PersistentOperation("exchange", steps)


def _run_exchange(group: ObjectMethods, messages: ExchangedMessages, timeout_s: float, async_op: bool) -> Any:
    group._dispatcher.check_open("exchange")
    messages.refill()
    return group._exchange(messages, async_op, timeout_s)


def _described(messages: Messages) -> list[list[object]]:
    return [[peer, flat.size, dtype_name(flat.dtype)] for peer, flat in messages]


def _compare(asked: Sequence[Any], number: int) -> None:
    """Raise CollectiveMismatch, on all ranks, unless each message has a receiver with a buffer for it."""
    for source, (sends, _, tag, _) in enumerate(asked):
        if tag != asked[0][2]:
            raise CollectiveMismatch(
                f"persistent exchange {number}: rank 0 has tag {asked[0][2]}, rank {source} has tag {tag}", peer=source
            )
        for target, (_, recvs, *_) in enumerate(asked):
            sent = [message[1:] for message in sends if message[0] == target]
            received = [message[1:] for message in recvs if message[0] == source]
            if sent != received:
                text = f"rank {source} sends {_listed(sent)} to rank {target}, which receives {_listed(received)}"
                raise CollectiveMismatch(f"persistent exchange {number}: {text}", peer=target)


def _listed(messages: Sequence[Sequence[object]]) -> str:
    return ", ".join(f"{size} x {dtype}" for size, dtype in messages) or "nothing"
