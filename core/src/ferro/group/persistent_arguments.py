"""The arguments of persistent collectives: those of the ordinary methods, without `async_op` and `copy`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ferro.arrays import dtype_problem
from ferro.errors import UsageError
from ferro.group import uneven
from ferro.group.arguments import Reads
from ferro.group.array_operations import Op, Operation
from ferro.types import ReduceOp

if TYPE_CHECKING:
    from ferro.group.blockwise_collectives import BlockwiseCollectives

# Of each method: the parameters that may be given by position, and those that must be given by name.
_PARAMETERS = {
    "all_reduce": (("x", "op"), ("out",)),
    "reduce": (("x", "root", "op"), ("out",)),
    "broadcast": (("x", "root"), ("out",)),
    "all_gather": (("x",), ("sizes", "out")),
    "gather": (("x", "root"), ("sizes", "out")),
    "scatter": (("x", "root"), ("sizes", "out")),
    "reduce_scatter": (("x", "op"), ("sizes", "out")),
    "all_to_all": (("x",), ("send_sizes", "recv_sizes", "out")),
    "barrier": ((), ()),
    "scan": (("x", "op"), ("out",)),
    "exscan": (("x", "op"), ("out",)),
    "min_loc": (("x",), ("out",)),
    "max_loc": (("x",), ("out",)),
    "send": (("x", "dst", "tag"), ()),
    "recv": (("buffer", "src", "tag"), ()),
    "sendrecv": (("x", "buffer", "dst", "src", "tag"), ()),
    "exchange": (("sends", "recvs", "tag"), ()),
}
_DEFAULTS: dict[str, Any] = {"op": ReduceOp.SUM, "root": 0, "tag": 0}  # None for the others


@dataclass(slots=True)
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
    x: Any
    out: Any
    reduction: Op | None
    root: int
    even: bool

    def repeats(self) -> bool:
        """Say whether one prepared operation can run again and again: it sees the arrays as they are, not copies."""
        return self.even and all(array is None or _is_seen_as_it_is(array) for array in (self.x, self.out))


def _is_seen_as_it_is(array: Any) -> bool:
    return type(array) is np.ndarray and (array.flags.c_contiguous or not dtype_problem(array.dtype))


def read_arguments(
    group: BlockwiseCollectives, op: str, args: Sequence[Any], options: dict[str, Any]
) -> PersistentArguments:
    """Read the arguments of a persistent collective, as its ordinary method takes them.

    Raises:
        UsageError: there is no such collective, or its method has no such arguments.
    """
    if op not in _PARAMETERS:
        raise UsageError(f"persistent: there is no operation {op!r}: use one of {', '.join(_PARAMETERS)}", op=op)
    given = bind(op, args, options)
    x: Any = given.get("x")
    out, root = given.get("out"), given.get("root", -1)
    even = given.get("sizes") is None and given.get("send_sizes") is None
    found = PersistentArguments(lambda out: group._operations.barrier(), x, out, given.get("op"), root, even)
    if "sizes" in given and op in ("all_gather", "gather"):
        given["sizes"] = group._gathered_rows(given["sizes"], x, None)[0]
    if op == "scatter":
        group._check_rank(root, "root")
        found.x = x if group.rank == root else None
        told = b""

        def tell(header: bytes) -> bytes:
            nonlocal told  # the root sends it once
            told = told or uneven.tell_header(header, lambda buffer: group.broadcast(buffer, root, out=buffer))
            found.even = uneven.read_header(told, group.world_size)[1].is_even
            return told

        given["tell"] = tell
    prepare: Callable[..., Operation]
    if op in ("scan", "exscan", "min_loc", "max_loc"):
        prepare = partial(group._extremum if "loc" in op else group._prefixes, op)
    else:
        prepare = getattr(group._operations, op)
    if op != "barrier":
        found.prepare = lambda out: prepare(**{**given, "out": out, "reads": Reads.AT_RUN})
    return found


def bind(op: str, args: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Give each argument of an operation its name, and defaults to those that are missing.

    Raises:
        UsageError: the operation has no such arguments, or the input is not there.
    """
    positional, named = _PARAMETERS[op]
    unknown = set(options).difference((*positional, *named)) | set(options).intersection(positional[: len(args)])
    if len(args) > len(positional) or unknown:
        wrong = ", ".join(sorted(unknown)) or f"{len(args)} arguments without a name"
        takes = ", ".join((*positional, *(f"{name}=" for name in named), "timeout_s="))
        raise UsageError(f"persistent {op} takes ({takes}), not {wrong}", op="persistent")
    given = {name: _DEFAULTS.get(name) for name in (*positional, *named)}
    given |= {**dict(zip(positional, args, strict=False)), **options}
    missing = "x" in positional and given["x"] is None and op != "scatter"
    if missing or isinstance(given.get("x"), list | tuple | int | float | complex | np.generic):
        kind = "missing" if missing else f"a {type(given['x']).__name__}"
        text = f"persistent {op}: the input is {kind}: pass an array, whose elements each step reads"
        raise UsageError(text, op="persistent")
    return given
