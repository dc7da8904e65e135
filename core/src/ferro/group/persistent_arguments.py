"""The arguments of persistent collectives: those of the ordinary methods, without `async_op` and `copy`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ferro.arrays import Input
from ferro.errors import UsageError
from ferro.group import uneven
from ferro.group.arguments import Reads
from ferro.group.array_operations import Op, Operation
from ferro.types import Array, ReduceOp

if TYPE_CHECKING:
    from ferro.group.array_collectives import Sizes
    from ferro.group.blockwise_collectives import BlockwiseCollectives

_AT_RUN = Reads.AT_RUN


@dataclass(slots=True, kw_only=True)
class PersistentArguments:
    """The arguments of a persistent collective.

    Attributes:
        prepare: checks the arguments and prepares one step, whose result goes to the given `out`.
        x: this rank's input, None where it has none.
        out: the caller's array for the result.
        reduction: as the user names it, None where nothing is reduced.
        root: -1 where there is none.
        even: True where all blocks have one size, on all ranks.
    """

    prepare: Callable[[Any], Operation]
    x: Any = None
    out: Any = None
    reduction: Op | None = None
    root: int = -1
    even: bool = True

    def repeats(self) -> bool:
        """Say whether one prepared operation can run again and again: it sees the arrays as they are, not copies."""
        return self.even and all(array is None or type(array) is np.ndarray for array in (self.x, self.out))


def arguments_of(group: BlockwiseCollectives, op: str, args: Sequence[Any], options: dict[str, Any]) -> Any:
    """Read the arguments of a persistent collective, as its ordinary method takes them.

    Raises:
        UsageError: there is no such collective, or its method has no such arguments.
    """
    read = _READERS.get(op)
    if read is None:
        names = ", ".join((*_READERS, "send", "recv", "sendrecv", "exchange"))
        raise UsageError(f"persistent: there is no operation {op!r}: use one of {names}", op="persistent")
    try:
        found = read(group, *args, **options)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # it comes from inside
        raise UsageError(f"persistent {op}: {str(error).removeprefix('_')}", op="persistent") from None
    if isinstance(found.x, list | tuple | int | float | complex | np.generic):
        raise UsageError(
            f"persistent {op}: the input is {type(found.x).__name__}: pass an array, whose elements each step reads",
            op="persistent",
        )
    return found


def _all_reduce(
    group: BlockwiseCollectives, x: Input, op: Op = ReduceOp.SUM, *, out: object = None
) -> PersistentArguments:
    def prepare(out: object) -> Operation:
        return group._operations.all_reduce(x, op, out, _AT_RUN)

    return PersistentArguments(prepare=prepare, x=x, out=out, reduction=op)


def _reduce(
    group: BlockwiseCollectives, x: Input, root: int = 0, op: Op = ReduceOp.SUM, *, out: object = None
) -> PersistentArguments:
    def prepare(out: object) -> Operation:
        return group._operations.reduce(x, root, op, out, _AT_RUN)

    return PersistentArguments(prepare=prepare, x=x, out=out, reduction=op, root=root)


def _broadcast(group: BlockwiseCollectives, x: Input, root: int = 0, *, out: object = None) -> PersistentArguments:
    def prepare(out: object) -> Operation:
        return group._operations.broadcast(x, root, out, _AT_RUN)

    return PersistentArguments(prepare=prepare, x=x, out=out, root=root)


def _all_gather(
    group: BlockwiseCollectives, x: Input, *, sizes: Sizes = None, out: object = None
) -> PersistentArguments:
    rows, _ = group._gathered_rows(sizes, x, None)

    def prepare(out: object) -> Operation:
        return group._operations.all_gather(x, rows, out, _AT_RUN)

    return PersistentArguments(prepare=prepare, x=x, out=out, even=sizes is None)


def _gather(
    group: BlockwiseCollectives, x: Input, root: int = 0, *, sizes: Sizes = None, out: object = None
) -> PersistentArguments:
    rows, _ = group._gathered_rows(sizes, x, None)

    def prepare(out: object) -> Operation:
        return group._operations.gather(x, root, rows, out, _AT_RUN)

    return PersistentArguments(prepare=prepare, x=x, out=out, root=root, even=sizes is None)


def _scatter(
    group: BlockwiseCollectives,
    x: Input | None = None,
    root: int = 0,
    *,
    sizes: Sequence[int] | None = None,
    out: object = None,
) -> PersistentArguments:
    group._check_rank(root, "root")
    headers: list[Array] = []  # the root's, as every rank has it

    def broadcast(header: Array) -> None:
        if headers:
            header[...] = headers[0]
        else:
            group.broadcast(header, root, out=header)
            headers.append(header.copy())
            found.even = len(set(uneven.read_header(header, group.world_size)[1].counts)) == 1

    def prepare(out: object) -> Operation:
        return group._operations.scatter(x, root, sizes, out, _AT_RUN, broadcast)

    found = PersistentArguments(prepare=prepare, x=x if group.rank == root else None, out=out, root=root)
    return found


def _reduce_scatter(
    group: BlockwiseCollectives,
    x: Input,
    op: Op = ReduceOp.SUM,
    *,
    sizes: Sequence[int] | None = None,
    out: object = None,
) -> PersistentArguments:
    def prepare(out: object) -> Operation:
        return group._operations.reduce_scatter(x, op, sizes, out, _AT_RUN)

    return PersistentArguments(prepare=prepare, x=x, out=out, reduction=op, even=sizes is None)


def _all_to_all(
    group: BlockwiseCollectives,
    x: Input,
    *,
    send_sizes: Sequence[int] | None = None,
    recv_sizes: Sequence[int] | None = None,
    out: object = None,
) -> PersistentArguments:
    def prepare(out: object) -> Operation:
        return group._operations.all_to_all(x, send_sizes, recv_sizes, out, _AT_RUN)

    return PersistentArguments(prepare=prepare, x=x, out=out, even=send_sizes is None)


def _barrier(group: BlockwiseCollectives) -> PersistentArguments:
    return PersistentArguments(prepare=lambda out: group._operations.barrier())


def _scan(group: BlockwiseCollectives, x: Input, op: Op = ReduceOp.SUM, *, out: object = None) -> PersistentArguments:
    return PersistentArguments(prepare=lambda out: group._prefixes("scan", x, op, out, _AT_RUN), x=x, out=out)


def _exscan(group: BlockwiseCollectives, x: Input, op: Op = ReduceOp.SUM, *, out: object = None) -> PersistentArguments:
    return PersistentArguments(prepare=lambda out: group._prefixes("exscan", x, op, out, _AT_RUN), x=x, out=out)


def _min_loc(group: BlockwiseCollectives, x: Input, *, out: Any = None) -> PersistentArguments:
    return PersistentArguments(prepare=lambda out: group._extremum("min_loc", x, out, _AT_RUN), x=x, out=out)


def _max_loc(group: BlockwiseCollectives, x: Input, *, out: Any = None) -> PersistentArguments:
    return PersistentArguments(prepare=lambda out: group._extremum("max_loc", x, out, _AT_RUN), x=x, out=out)


_READERS: dict[str, Callable[..., PersistentArguments]] = {
    "all_reduce": _all_reduce,
    "reduce": _reduce,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "gather": _gather,
    "scatter": _scatter,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "barrier": _barrier,
    "scan": _scan,
    "exscan": _exscan,
    "min_loc": _min_loc,
    "max_loc": _max_loc,
}
