"""Persistent transfers: messages whose buffers are checked once, and that are sent and received many times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ferro.arrays import Input, dtype_name
from ferro.collectives.fast_path import PersistentExchange
from ferro.errors import CollectiveMismatch, UsageError
from ferro.group.arguments import Reads
from ferro.group.exchanged_messages import ExchangedMessages
from ferro.group.persistent import PersistentOperation, RepeatedSteps
from ferro.group.transfers import Messages, Transfer
from ferro.types import Device

if TYPE_CHECKING:
    from ferro.group.process_group import ProcessGroup
    from ferro.group.transfer_methods import TransferMethods


def persistent_transfer(
    group: TransferMethods, op: str, args: Sequence[Any], options: dict[str, Any], timeout_s: float
) -> PersistentOperation:
    """Make a persistent send, recv or sendrecv, which repeats the ordinary call with the arrays given."""
    forbidden = {"async_op", "copy"}.intersection(options)
    if forbidden:
        raise UsageError(f"persistent {op}: leave out {', '.join(sorted(forbidden))}: see start() and wait()", op=op)
    method = getattr(group, op)
    check = _CHECKS[op]
    try:
        check(group, *args, **options)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise
        raise UsageError(f"persistent {op}: {str(error).removeprefix('_check_')}", op=op) from None
    in_place = {} if op == "recv" else {"copy": False}

    def run(async_op: bool) -> Any:
        if async_op:
            return method(*args, **options, **in_place, async_op=True, timeout_s=timeout_s)
        return method(*args, **options, timeout_s=timeout_s)

    return PersistentOperation(op, RepeatedSteps(run))


def _check_send(group: TransferMethods, x: Input, dst: int, tag: int = 0) -> None:
    group._check_peer(dst, "send to", tag)
    group._message(x, copy=False)


def _check_recv(group: TransferMethods, buffer: Input, src: int, tag: int = 0) -> None:
    group._check_peer(src, "receive from", tag)
    group._output(buffer)


def _check_sendrecv(
    group: TransferMethods, x: Input, buffer: Input, dst: int, src: int | None = None, tag: int = 0
) -> None:
    src = dst if src is None else src
    if not dst == src == group.rank:
        group._check_peer(dst, "send to", tag)
        group._check_peer(src, "receive from", tag)
    group._message(x, copy=False)
    group._output(buffer)


_CHECKS: dict[str, Callable[..., None]] = {"send": _check_send, "recv": _check_recv, "sendrecv": _check_sendrecv}


def persistent_exchange(
    group: ProcessGroup, number: int, args: Sequence[Any], options: dict[str, Any], timeout_s: float
) -> PersistentOperation:
    """Make a persistent exchange, after all ranks have compared what they send with what the others receive."""
    try:
        messages = _read_exchange(group, *args, **options)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise
        raise UsageError(f"persistent exchange: {str(error).removeprefix('_read_')}", op="exchange") from None
    dispatcher = group._dispatcher
    with dispatcher.sequence("persistent", timeout_s) as remaining_s:
        own = [_described(messages.sends), _described(messages.recvs), messages.tag]
        _compare(group.all_gather_object(own, timeout_s=remaining_s()), number)
        native = None
        if not dispatcher.observed and messages.device is Device.CPU:
            native = group._backend.persistent_exchange(
                messages.sends, messages.recvs, number=number, deadline=time.monotonic() + remaining_s()
            )
    if native is None:
        return PersistentOperation("exchange", RepeatedSteps(partial(_run_exchange, group, messages, timeout_s)))
    return PersistentOperation("exchange", _ExchangeSteps(group, native, messages, timeout_s))


def _read_exchange(
    group: TransferMethods, sends: Sequence[tuple[int, Input]], recvs: Sequence[tuple[int, Input]], tag: int = 0
) -> ExchangedMessages:
    return ExchangedMessages(group, sends, recvs, tag, Reads.AT_RUN)


def _run_exchange(group: TransferMethods, messages: ExchangedMessages, timeout_s: float, async_op: bool) -> Any:
    messages.refill()
    return group._exchange(messages, async_op, timeout_s)


def _described(messages: Messages) -> list[list[object]]:
    return [[peer, flat.size, dtype_name(flat.dtype)] for peer, flat in messages]


def _compare(asked: Sequence[Any], number: int) -> None:
    """Raise CollectiveMismatch, on all ranks, unless each message has a receiver with a buffer for it."""
    for source, (sends, _, tag) in enumerate(asked):
        if tag != asked[0][2]:
            raise CollectiveMismatch(
                f"persistent exchange {number}: rank 0 has tag {asked[0][2]}, rank {source} has tag {tag}", peer=source
            )
        for target, (_, recvs, _) in enumerate(asked):
            sent = [message[1:] for message in sends if message[0] == target]
            received = [message[1:] for message in recvs if message[0] == source]
            if sent != received:
                text = f"rank {source} sends {_listed(sent)} to rank {target}, which receives {_listed(received)}"
                raise CollectiveMismatch(f"persistent exchange {number}: {text}", peer=target)


def _listed(messages: Sequence[Sequence[object]]) -> str:
    return ", ".join(f"{size} x {dtype}" for size, dtype in messages) or "nothing"


def _nothing(*_: object) -> None:
    """Begin, or end, a transfer that the backend carries out."""


class _ExchangeSteps:
    """Steps of a persistent exchange in the backend's own way."""

    result = None

    def __init__(
        self, group: TransferMethods, native: PersistentExchange, messages: ExchangedMessages, timeout_s: float
    ) -> None:
        self.at_once = None
        self._dispatcher = group._dispatcher
        self._native = native
        self._messages = messages
        described = Transfer("exchange", messages.sends, messages.recvs, messages.tag, timeout_s, _nothing, _nothing)
        self._finish = partial(self._dispatcher.run_late, timeout_s, described.call, native.finish, described)

    def run(self) -> None:
        self._dispatcher.check_open("exchange")
        self._messages.refill()
        if not self._native():
            self._finish()
        self._messages.finish()

    def start(self) -> None:
        self._dispatcher.check_open("exchange")
        self._messages.refill()
        self._native.start()

    def done(self) -> bool:
        return self._native.test()

    def wait(self) -> None:
        if not self._native.test():
            self._finish()
        self._messages.finish()

    def close(self) -> None:
        self._native.close()
