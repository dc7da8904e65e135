"""Reducer: averages gradients bucket by bucket while the backward pass goes on.

A bucket is launched when all its gradients are complete and all buckets before it are launched:
in one order on every rank, whatever order the gradients come in. What is left at the end of the
backward pass is launched then; only then is it waited for.

A rank that lacks a gradient must not leave the others waiting. It sends zeros in its place, and
says so in a flag: one element behind the last bucket's gradients, which this rank launches only
when it knows. So the agreement that nobody lacks anything costs no message. (A hook does not
see the flag; with one, it is a reduction of one byte.) Where the flag comes back raised, all
ranks have seen it, and tell each other the names for the error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from ferro import GroupClosed, ProcessGroup, UsageError

from ..nn.checks import first_few
from ..nn.parameter import Parameter
from .bucket import Bucket, Hook, Pending, make_buckets

_NAMES_SHOWN = 8


class Reducer:
    """Owns the buckets of some parameters.

    Args:
        parameters: by qualified name, in order of definition, the same on every rank.
        group: over which gradients are averaged.
        hook: how a bucket is averaged; None for an exact mean.
        find_unused: whether a parameter may be without gradient.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        group: ProcessGroup,
        *,
        first_bucket_bytes: int,
        bucket_bytes: int,
        hook: Hook | None,
        find_unused: bool,
    ) -> None:
        self._parameters = parameters
        self._group = group
        self._hook = hook
        self._find_unused = find_unused
        self._buckets = make_buckets(
            parameters, group, first_bucket_bytes=first_bucket_bytes, bucket_bytes=bucket_bytes
        )
        self._bucket_of = {
            id(member): bucket.content.index
            for bucket in self._buckets
            for member in bucket.members
        }
        self._ready: set[int] = set()
        self._waiting_for: list[int] = []  # by bucket, how many gradients are not complete
        self._launched: list[Pending] = []
        self._listening = False
        for parameter in parameters.values():
            parameter.on_complete(self._completed)

    def expect(self) -> None:
        """Get ready for a backward pass, right after the forward pass.

        With `find_unused`, a parameter without outstanding use took no part: nothing is waited
        for, so that the buckets behind it need not wait for the end either.
        """
        self._ready.clear()
        self._waiting_for = [len(bucket.members) for bucket in self._buckets]
        if self._find_unused:
            for parameter in self._parameters.values():
                if parameter.outstanding_uses == 0:
                    self._mark(parameter)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Launch buckets as their gradients become complete."""
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    def finish(self, divisor: int) -> None:
        """Launch what is left, and wait until every `grad` holds the mean.

        Args:
            divisor: by how many the sum over all ranks is divided.

        Raises:
            UsageError: a rank lacks gradients, without `find_unused`; raised on every rank. The
                group is still good; gradients are undefined until `zero_grad()`.
        """
        used = [item.grad is not None for item in self._parameters.values()]
        missing = [name for name, found in zip(self._parameters, used, strict=True) if not found]
        self._exchange(missing, used, divisor)

    def shadow(self, divisor: int) -> None:
        """Take part in the other ranks' reduction, with nothing to give: all `grad` are None."""
        self._zero_grad()
        self.expect()
        self._exchange([], [False] * len(self._parameters), divisor)
        self._zero_grad()

    def _exchange(self, missing: list[str], used: list[bool], divisor: int) -> None:
        while len(self._launched) < len(self._buckets):
            self._launch(flag=bool(missing))
        anywhere = self._start_union(used) if self._find_unused else None
        works, self._launched = self._launched, []
        for work in works:
            work.wait()
        if divisor != self._group.world_size:
            for bucket in self._buckets:
                buffer = bucket.content.buffer
                buffer *= self._group.world_size / divisor
        if anywhere is not None:
            self._adopt(anywhere)
        elif self._anyone_lacks(missing):
            raise self._unused_error(missing)

    # -- launching -------------------------------------------------------------------------------

    def _completed(self, parameter: Parameter) -> None:
        if not self._listening:
            return
        if self._bucket_of[id(parameter)] < len(self._launched):
            raise UsageError(
                f"DDP: the gradient of parameter {parameter.name!r} grew after it was sent to "
                "the other ranks. Announce each use in the forward pass by Parameter.use(), and "
                "add through that."
            )
        self._mark(parameter)
        while (
            len(self._launched) < len(self._buckets)
            and not (self._waiting_for[len(self._launched)])
        ):
            self._launch(flag=False)

    def _mark(self, parameter: Parameter) -> None:
        if id(parameter) not in self._ready:
            self._ready.add(id(parameter))
            self._waiting_for[self._bucket_of[id(parameter)]] -= 1

    def _launch(self, *, flag: bool) -> None:
        bucket = self._buckets[len(self._launched)]
        for member, grad in zip(bucket.members, bucket.content.grads, strict=True):
            current = member.grad
            if current is None:
                grad[...] = 0
            elif current is not grad:
                raise UsageError(
                    f"DDP: the gradient of parameter {member.name!r} is no longer in its bucket; "
                    "another strategy has taken it. Wrap a module once."
                )
        bucket.memory[bucket.content.buffer.size :] = flag
        try:
            self._launched.append(self._start(bucket))
        except GroupClosed:
            for work in self._launched:
                work.wait()  # raises what the group died of
            raise

    def _start(self, bucket: Bucket) -> Pending:
        if self._hook is not None:
            return self._hook(bucket.content, self._group)
        work: Pending = self._group.all_reduce(
            bucket.memory, "mean", out=bucket.memory, async_op=True
        )
        return work

    # -- parameters without gradient -------------------------------------------------------------

    def _start_union(self, used: list[bool]) -> Pending:
        flags = np.array(used, np.uint8)
        union: Pending = self._group.all_reduce(flags, "max", out=flags, async_op=True)
        return union

    def _adopt(self, anywhere: Pending) -> None:
        """Give `grad` to the parameters that another rank has used."""
        flags = anywhere.wait()
        assert isinstance(flags, np.ndarray)
        grads = {
            id(member): grad
            for bucket in self._buckets
            for member, grad in zip(bucket.members, bucket.content.grads, strict=True)
        }
        for flag, parameter in zip(flags, self._parameters.values(), strict=True):
            if flag and parameter.grad is None:
                parameter.grad = grads[id(parameter)]

    def _anyone_lacks(self, missing: list[str]) -> bool:
        if self._hook is None:
            return bool(self._buckets[-1].memory[-1] != 0)
        return bool(self._group.all_reduce(np.array(len(missing) > 0, np.uint8), "max"))

    def _unused_error(self, missing: list[str]) -> UsageError:
        everyones: list[list[str]] = self._group.all_gather_object(missing)
        faults = "; ".join(
            f"rank {rank}: {', '.join(first_few(names, _NAMES_SHOWN))}"
            for rank, names in enumerate(everyones)
            if names
        )
        return UsageError(
            "DDP: the backward pass ended, and parameters have no gradient: "
            f"{faults}. Use them in the forward pass, freeze them (requires_grad=False) before "
            "wrapping, or pass find_unused=True. Gradients are undefined until zero_grad().",
            group=self._group.name,
            rank=self._group.rank,
        )

    def _zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.zero_grad()
