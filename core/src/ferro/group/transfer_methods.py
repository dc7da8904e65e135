"""The transfers of a group: messages between two ranks, and many of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro.arrays import Input
from ferro.errors import UsageError
from ferro.group.arguments import NamedDtypeBuffer, OutputBuffer, Reads
from ferro.group.array_collectives import ResultOrWork, Timeout
from ferro.group.array_operations import no_result
from ferro.group.blockwise_collectives import BlockwiseCollectives
from ferro.group.exchanged_messages import ExchangedMessages
from ferro.group.work import Work
from ferro.types import Array


class TransferMethods(BlockwiseCollectives):
    """The methods of `ProcessGroup` by which ranks send each other arrays."""

    def send(
        self, x: Input, dst: int, tag: int = 0, *, async_op: bool = False, copy: bool = True, timeout_s: Timeout = None
    ) -> ResultOrWork:
        """Send `x` to rank `dst`, which must call `recv` with the same tag, dtype and size.

        Messages with one tag arrive in the order sent; those with different tags do not wait for each other. Returns
        None, or a Work.
        """
        self._check_peer(dst, "send to", tag)
        buffer, device = self._checker.check_message(x, copy=async_op and copy)
        return self._dispatcher.transfer("send", [(dst, buffer)], [], tag, no_result, async_op, timeout_s, device)

    def recv(
        self, buffer: Input, src: int, tag: int = 0, *, async_op: bool = False, timeout_s: Timeout = None
    ) -> ResultOrWork:
        """Fill `buffer` with the message of rank `src` with this tag; return `buffer`, or a Work.

        Args:
            buffer: contiguous and writable, with the dtype and number of elements sent.
            src: the sender.
            tag: from 0 to 2**31 - 1.
        """
        self._check_peer(src, "receive from", tag)
        result = self._checker.check_buffer(buffer)
        recvs = [(src, result.flat)]
        return self._dispatcher.transfer("recv", [], recvs, tag, result, async_op, timeout_s, result.device)

    def sendrecv(
        self,
        x: Input,
        buffer: Input,
        dst: int,
        src: int | None = None,
        tag: int = 0,
        *,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: Timeout = None,
    ) -> ResultOrWork:
        """Send `x` to `dst` and fill `buffer` from `src` (or `dst`) at the same time.

        Never deadlocks, whatever the ranks' order. Both may be this rank itself. Returns `buffer`, or a Work.
        """
        src = dst if src is None else src
        alone = dst == src == self.rank  # as in a ring of one rank
        if not alone:
            self._check_peer(dst, "send to", tag)
            self._check_peer(src, "receive from", tag)
        source, device = self._checker.check_message(x, copy=async_op and copy)
        result = self._checker.check_buffer(buffer)
        if device is result.device and np.may_share_memory(source, result.flat):
            source = source.copy()
        if alone:
            return self._send_to_itself(source, result, async_op)
        sends, recvs = [(dst, source)], [(src, result.flat)]
        return self._dispatcher.transfer("sendrecv", sends, recvs, tag, result, async_op, timeout_s, device)

    def exchange(
        self,
        sends: Sequence[tuple[int, Input]],
        recvs: Sequence[tuple[int, Input]],
        tag: int = 0,
        *,
        async_op: bool = False,
        copy: bool = True,
        timeout_s: Timeout = None,
    ) -> ResultOrWork:
        """Send and receive many messages at the same time, as at the borders of a decomposed grid.

        Never deadlocks, whatever the order of the ranks' calls. Messages between two ranks match in the order given. A
        rank may be its own neighbour. Returns None, or a Work.

        Args:
            sends: (rank, array) of every message to send.
            recvs: (rank, buffer) of every message to receive, as in `recv`.
            tag: of all of them, from 0 to 2**31 - 1.
        """
        self._dispatcher.check_open("exchange")
        messages = ExchangedMessages(self._checker, sends, recvs, tag, Reads.COPY if async_op and copy else Reads.NOW)
        return self._exchange(messages, async_op, timeout_s)

    def _exchange(self, messages: ExchangedMessages, async_op: bool, timeout_s: float | None) -> ResultOrWork:
        if not (messages.sends or messages.recvs):
            messages.finish()
            return self._ended("exchange", None, async_op)
        moved = messages.sends, messages.recvs, messages.tag, messages.finish
        return self._dispatcher.transfer("exchange", *moved, async_op, timeout_s, messages.device)

    def _send_to_itself(self, source: Array, result: OutputBuffer | NamedDtypeBuffer, async_op: bool) -> ResultOrWork:
        self._dispatcher.check_open("sendrecv")
        if (source.size, source.dtype) != (result.flat.size, result.flat.dtype):
            raise UsageError(
                f"sendrecv of rank {self.rank} with itself: the buffer takes {result.flat.size} x {result.flat.dtype}, "
                f"the message has {source.size} x {source.dtype}"
            )
        result.flat[...] = source
        return self._ended("sendrecv", result(), async_op)

    def _ended(self, op: str, result: object, async_op: bool) -> ResultOrWork:
        """Return the result of a transfer that needed no other rank, or a Work of it."""
        if not async_op:
            return result
        work: Work[object] = Work(op, 0)
        work._run(lambda _: result)
        return work
