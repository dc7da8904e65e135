"""Reducer: average gradients bucket by bucket while the backward pass goes on.

A bucket is launched when all its gradients are complete and all buckets before it are launched:
every rank launches in the same order, whatever order its gradients come in. At the end of the
backward pass the reducer launches the remaining buckets, and then waits for all of them.

A rank that lacks a gradient must not leave the others waiting. It sends zeros in its place, and sets a flag: one
element after the gradients of the last bucket, which such a rank launches at the end of its backward pass. So the ranks
agree that no gradient is missing without another message. If the mean of the flags is not zero, all ranks see it, and
gather the names of the parameters for the error.

A checksum of the parameters follows the flag, by which all ranks see whether their replicas are still equal. (A hook
sees neither; with a hook, flag and checksum are another reduction, of a few bytes.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from ferro import GroupClosed, ProcessGroup, UsageError

from ..nn.arrays import Array
from ..nn.checks import first_few
from ..nn.parameter import Parameter
from ..replica_check import ReplicaCheck, replicas_error
from .bucket import Bucket, Hook, Pending, make_buckets
from .bucket_reductions import BucketReductions

_NAMES_SHOWN = 8


class Reducer:
    """The buckets of some parameters, and the reductions that average them.

    Args:
        parameters: by qualified name, in order of definition, the same on every rank.
        group: the ranks whose gradients are averaged.
        hook: averages a bucket; None for an exact mean.
        find_unused: whether a parameter may stay without gradient.
        replica: lists the parameters that must be equal on all ranks; None: they are not checked.
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
        replica: Callable[[], Sequence[Parameter]] | None,
    ) -> None:
        self._parameters = parameters
        self._replica = replica
        self._check = ReplicaCheck(group)
        self._group = group
        self._hook = hook
        self._find_unused = find_unused
        self._buckets = make_buckets(
            parameters,
            group,
            first_bucket_bytes=first_bucket_bytes,
            bucket_bytes=bucket_bytes,
            tail_size=1 + self._check.tail_size,
        )
        self._reductions = BucketReductions(self._buckets, group)
        self._bucket_of = {
            id(member): bucket.gradients.index for bucket in self._buckets for member in bucket.parameters
        }
        self._ready: set[int] = set()
        self._incomplete: list[int] = []  # for each bucket, its number of incomplete gradients
        self._launched: list[Pending] = []
        self._backward_running = False
        self._digest: int | None = None
        self._reduced: list[int | None] = [None] * len(parameters)  # `times_zeroed` when `grad` was last reduced
        for parameter in parameters.values():
            parameter.on_complete(self._on_complete)

    def begin_step(self) -> None:
        """Count the gradients to come; called right after the forward pass.

        With `find_unused`, a parameter without outstanding use took no part in the forward pass. Its gradient counts as
        complete, so that its bucket and later buckets need not wait.
        """
        self._ready.clear()
        self._incomplete = [len(bucket.parameters) for bucket in self._buckets]
        if self._find_unused:
            for parameter in self._parameters.values():
                if parameter.outstanding_uses == 0:
                    self._mark_ready(parameter)

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Launch buckets as their gradients become complete."""
        self._backward_running = True
        try:
            yield
        finally:
            self._backward_running = False

    def finish(self, divisor: int, counting: int) -> None:
        """Launch the remaining buckets, and wait until every `grad` holds the mean.

        Args:
            divisor: the number by which the sum over all ranks is divided.
            counting: the number of ranks whose parameters must be equal.

        Raises:
            UsageError: a rank lacks gradients, without `find_unused`; or replicas differ; raised on every rank. The
                group stays usable; gradients are undefined until `zero_grad()`.
        """
        used = [item.grad is not None for item in self._parameters.values()]
        missing = [name for name, found in zip(self._parameters, used, strict=True) if not found]
        self._reduce_all(missing, used, divisor, counting)

    def shadow(self, divisor: int, counting: int, carried: Sequence[bool]) -> None:
        """Take part in the other ranks' reduction without gradients of this rank's own.

        Args:
            divisor: as for `finish`.
            counting: as for `finish`.
            carried: for each parameter, whether its `grad` on the other ranks contains the last mean, to which this
                rank then contributes as they do.
        """
        self._zero_grad()
        grads = self._grads()
        for parameter, carries in zip(self._parameters.values(), carried, strict=True):
            if carries:
                parameter.grad = grads[id(parameter)]  # the mean is still there
        self.begin_step()
        self._reduce_all([], list(carried), divisor, counting, shadowing=True)
        self._zero_grad()

    def carried(self) -> list[bool]:
        """Tell for each parameter whether `grad` contains the last mean: nobody has called `zero_grad` since."""
        return [
            item.grad is not None and item.times_zeroed == times
            for item, times in zip(self._parameters.values(), self._reduced, strict=True)
        ]

    def _reduce_all(
        self, missing: list[str], used: list[bool], divisor: int, counting: int, *, shadowing: bool = False
    ) -> None:
        if not self._parameters:  # on no rank, because all have the same model
            return
        while len(self._launched) < len(self._buckets):
            self._launch(missing=bool(missing), shadowing=shadowing)
        union = self._start_union(used) if self._find_unused else None
        works, self._launched = self._launched, []
        for work in works:
            work.wait()
        if divisor != self._group.world_size:
            for bucket in self._buckets:
                buffer = bucket.gradients.buffer
                buffer *= self._group.world_size / divisor
        any_misses, equal = self._read_tail(missing, counting)
        if union is not None:
            self._keep_gradients_of(union)
        elif any_misses:
            raise self._unused_error(missing)
        self._reduced = [item.times_zeroed for item in self._parameters.values()]
        if not equal and self._replica is not None:
            named = [(parameter.name, parameter.data) for parameter in self._replica()]
            raise replicas_error("DDP", self._group, named, counts=not shadowing)

    # -- launching -------------------------------------------------------------------------------

    def _on_complete(self, parameter: Parameter) -> None:
        if not self._backward_running:
            return
        if self._bucket_of[id(parameter)] < len(self._launched):
            raise UsageError(
                f"DDP: the gradient of parameter {parameter.name!r} grew after it was sent to "
                "the other ranks. Announce each use in the forward pass by Parameter.use(), and "
                "add through that."
            )
        self._mark_ready(parameter)
        while len(self._launched) < len(self._buckets) and not self._incomplete[len(self._launched)]:
            self._launch(missing=False, shadowing=False)

    def _mark_ready(self, parameter: Parameter) -> None:
        if id(parameter) not in self._ready:
            self._ready.add(id(parameter))
            self._incomplete[self._bucket_of[id(parameter)]] -= 1

    def _launch(self, *, missing: bool, shadowing: bool) -> None:
        bucket = self._buckets[len(self._launched)]
        for member, grad in zip(bucket.parameters, bucket.gradients.grads, strict=True):
            current = member.grad
            if current is None:
                grad[...] = 0
            elif current is not grad:
                raise UsageError(
                    f"DDP: the gradient of parameter {member.name!r} is no longer in its bucket; "
                    "another strategy has taken it. Wrap a module once."
                )
        if len(self._launched) == len(self._buckets) - 1:
            self._write_tail(bucket.tail, missing=missing, shadowing=shadowing)
        try:
            self._launched.append(self._start(bucket))
        except GroupClosed:
            for work in self._launched:
                work.wait()  # raises the error that closed the group
            raise

    def _start(self, bucket: Bucket) -> Pending:
        if self._hook is not None:
            return self._hook(bucket.gradients, self._group)
        return self._reductions.start(bucket)

    # -- the tail of the last bucket ---------------------------------------------------------------

    def _write_tail(self, tail: Array, *, missing: bool, shadowing: bool) -> None:
        self._digest = None
        if self._replica is not None and not shadowing:
            self._digest = self._check.digest([parameter.data for parameter in self._replica()])
        elif self._replica is not None:
            self._check.skip()
        if self._hook is None:
            tail[0] = missing
            self._check.write(self._digest, tail[1:])

    def _read_tail(self, missing: list[str], counting: int) -> tuple[bool, bool]:
        """Tell whether a rank lacks gradients, and whether the replicas are equal."""
        if self._hook is None:
            tail = self._buckets[-1].tail
            return bool(tail[0] != 0), self._replica is None or self._check.agree(tail[1:], counting)
        message = np.concatenate([np.array([len(missing) > 0], np.uint8), self._check.to_bytes(self._digest)])
        self._group.all_reduce(message, "max", out=message)
        return bool(message[0]), self._replica is None or self._check.agree_bytes(message[1:])

    # -- parameters without gradient -------------------------------------------------------------

    def _start_union(self, used: list[bool]) -> Pending:
        flags = np.array(used, np.uint8)
        union: Pending = self._group.all_reduce(flags, "max", out=flags, async_op=True)
        return union

    def _keep_gradients_of(self, used_anywhere: Pending) -> None:
        """Set `grad` of the parameters that only other ranks used."""
        flags = used_anywhere.wait()
        assert isinstance(flags, np.ndarray)
        grads = self._grads()
        for flag, parameter in zip(flags, self._parameters.values(), strict=True):
            if flag and parameter.grad is None:
                parameter.grad = grads[id(parameter)]

    def _grads(self) -> dict[int, Array]:
        """Map the identity of each parameter to the memory of its gradient."""
        return {
            id(member): grad
            for bucket in self._buckets
            for member, grad in zip(bucket.parameters, bucket.gradients.grads, strict=True)
        }

    def _unused_error(self, missing: list[str]) -> UsageError:
        by_rank: list[list[str]] = self._group.all_gather_object(missing)
        faults = "; ".join(
            f"rank {rank}: {', '.join(first_few(names, _NAMES_SHOWN))}" for rank, names in enumerate(by_rank) if names
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
