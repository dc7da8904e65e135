"""Buckets: the memory in which gradients are accumulated, reduced, and read by the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ferro import ProcessGroup

from ..nn.arrays import Array, namespace_of
from ..nn.parameter import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class GradBucket:
    """Complete gradients, as a communication hook gets them.

    Attributes:
        index: number of the bucket, the same on every rank; hooks get the buckets in this order.
        buffer: (elements,), all gradients one after the other; the hook reduces it in place.
        grads: views of `buffer` in the shapes of the parameters.
        names: qualified names of the parameters.
    """

    index: int
    buffer: Array
    grads: tuple[Array, ...]
    names: tuple[str, ...]


class Pending(Protocol):
    """An operation that is under way, such as a `ferro.Work`."""

    def wait(self) -> object:
        """Wait for the end of the operation; raises its error."""


# A hook starts to average a bucket over the group, and returns an operation. When the operation's `wait()` returns,
# `bucket.buffer` must hold the mean, the same on every rank. Every rank calls the hook with the same buckets in the
# same order, and also waits in that order, so both the hook and `wait()` may use collectives.
Hook: TypeAlias = Callable[[GradBucket, ProcessGroup], Pending]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A bucket as the reducer uses it.

    Attributes:
        parameters: the parameters whose gradients are in the bucket.
        gradients: the gradients, as a hook gets them.
        memory: the array that is sent. In the last bucket a tail follows the gradients: a flag that a rank sets which
            lacks gradients (see `reducer`), and a checksum of the rank's parameters (see `replicas`).

            | gradient | gradient | … | gradient | flag | checksum |
            |--------------- buffer -------------|----- tail ------|
    """

    parameters: tuple[Parameter, ...]
    gradients: GradBucket
    memory: Array

    @property
    def tail(self) -> Array:
        """The elements of `memory` after the gradients."""
        return self.memory[self.gradients.buffer.size :]


def make_buckets(
    parameters: Mapping[str, Parameter],
    group: ProcessGroup,
    *,
    first_bucket_bytes: int,
    bucket_bytes: int,
    tail_size: int,
) -> list[Bucket]:
    """Allocate buckets, the last one with a tail, and place the gradients of the parameters in them."""
    names, held = list(parameters), list(parameters.values())
    plan = plan_buckets(
        [item.data.size * item.grad_dtype.itemsize for item in held],
        [item.grad_dtype.name for item in held],
        first_bucket_bytes=first_bucket_bytes,
        bucket_bytes=bucket_bytes,
    )
    buckets = []
    for index, chosen in enumerate(plan):
        tail = tail_size if index == len(plan) - 1 else 0
        inside = tuple(held[number] for number in chosen)
        size = sum(member.data.size for member in inside)
        memory = _allocate(group, size + tail, inside[0])
        buffer = memory[:size]
        grads = _cut(buffer, [member.data.shape for member in inside])
        for member, grad in zip(inside, grads, strict=True):
            member.set_grad_memory(grad)
        gradients = GradBucket(index=index, buffer=buffer, grads=grads, names=tuple(names[number] for number in chosen))
        buckets.append(Bucket(parameters=inside, gradients=gradients, memory=memory))
    return buckets


def _allocate(group: ProcessGroup, size: int, like: Parameter) -> Array:
    """Allocate the memory that the backend sends fastest, on the device of `like`, for its gradient."""
    memory: Array = group.empty(size, like.grad_dtype)
    xp = namespace_of(like.data)
    if namespace_of(memory) is not xp:
        memory = xp.empty(size, like.grad_dtype)
    return memory


def _cut(buffer: Array, shapes: list[tuple[int, ...]]) -> tuple[Array, ...]:
    pieces, start = [], 0
    for shape in shapes:
        end = start + math.prod(shape)
        pieces.append(buffer[start:end].reshape(shape))
        start = end
    return tuple(pieces)


def plan_buckets(
    sizes: Sequence[int], kinds: Sequence[str], *, first_bucket_bytes: int, bucket_bytes: int
) -> list[list[int]]:
    """Put gradients into buckets, in the order in which a backward pass should complete them.

    A backward pass completes gradients roughly in reverse order of definition, so buckets are
    filled in that order. The first is small, so that communication starts early; the others are
    large, so that it is efficient. For sizes 2 3 3 9 1 1, caps of 2 and 6:

        parameter      0   1   2   3   4   5
        bytes          2   3   3   9   1   1
        bucket        (3) (2) (2) (1) (0) (0)      3 is larger than the cap, and so alone

    Args:
        sizes: bytes of each gradient, in order of definition.
        kinds: dtype of each gradient; a bucket holds gradients of one dtype.
        first_bucket_bytes: largest size of the first bucket of each dtype.
        bucket_bytes: largest size of every other bucket.

    Returns:
        Indices for each bucket, in reverse order of definition. Buckets are ordered by the time
        at which their last gradient should be complete.
    """
    buckets: list[list[int]] = []
    current: dict[str, list[int]] = {}
    room: dict[str, int] = {}
    for index in reversed(range(len(sizes))):
        kind, size = kinds[index], sizes[index]
        if kind not in room or size > room[kind]:
            room[kind] = bucket_bytes if kind in room else first_bucket_bytes
            current[kind] = []
            buckets.append(current[kind])
        current[kind].append(index)
        room[kind] -= size
    return sorted(buckets, key=lambda bucket: -bucket[-1])
