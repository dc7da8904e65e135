"""Conformance of refusing: wrong calls raise before anything moves, and the group is still good."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ferro.errors import FerroError, UnsupportedError, UsageError
from ferro.group import ProcessGroup
from ferro.testing.case import Case
from ferro.testing.samples import Findings


def check_usage_errors(case: Case) -> None:
    """Every wrong call raises UsageError or UnsupportedError and leaves the group usable."""
    if case.supports("all_reduce"):
        case.verify_all(_misuse)


def check_unsupported(case: Case) -> None:
    """Every operation that is declared unsupported raises UnsupportedError on every rank."""
    if case.unsupported:
        case.verify(_call_unsupported, case.largest, sorted(case.unsupported))


def _misuse(group: ProcessGroup) -> list[str]:
    found = Findings(group.rank)
    n, count = group.world_size, 2 * group.world_size
    x = np.ones(count)
    read_only = np.ones(count)
    read_only.flags.writeable = False
    wrong: dict[str, Callable[[], object]] = {
        "root too large": lambda: group.broadcast(x, n),
        "root negative": lambda: group.reduce(x, -1),
        "send out of range": lambda: group.send(x, n),
        "receive from itself": lambda: group.recv(x, group.rank),
        "send to itself": lambda: group.send(x, group.rank),
        "negative tag": lambda: group.send(x, (group.rank + 1) % n, -1),
        "unknown reduction": lambda: group.all_reduce(x, "median"),
        "sizes of one rank less": lambda: group.scatter(x, group.rank, sizes=[count] * (n - 1)),
        "0-d array to cut": lambda: group.all_to_all(np.array(1.0)),
        "sizes of another number": lambda: group.all_gather(x, sizes=[1] * (n + 1)),
        "sizes that disagree": lambda: group.reduce_scatter(x, sizes=[3] * n),
        "out of another shape": lambda: group.all_reduce(x, out=np.ones(count + 1)),
        "out of another dtype": lambda: group.all_reduce(x, out=np.ones(count, np.float32)),
        "out not contiguous": lambda: group.all_reduce(x, out=np.ones(2 * count)[::2]),
        "out read-only": lambda: group.all_reduce(x, out=read_only),
        "strings": lambda: group.all_reduce(["a", "b"]),
        "objects": lambda: group.all_reduce(np.array([None, x], dtype=object)),
        "no time": lambda: group.all_reduce(x, timeout_s=0),
        "mean of integers": lambda: group.all_reduce(np.ones(2, int), "mean"),
        "bits of floats": lambda: group.all_reduce(x, "bxor"),
        "subgroup of strangers": lambda: group.subgroup([n]),
    }
    if n > 1:
        wrong["rows that do not divide"] = lambda: group.reduce_scatter(np.ones(n + 1))
    for what, call in wrong.items():
        try:
            call()
        except (UsageError, UnsupportedError):
            total = group.all_reduce(np.array(1))
            found.true(int(total) == n, f"after {what} all_reduce gives {total}")
        except FerroError as error:
            found.note(f"{what}: raised {type(error).__name__}: {error}")
        else:
            found.note(f"{what}: raised nothing")
    return found.report()


def _call_unsupported(group: ProcessGroup, ops: Sequence[str]) -> list[str]:
    """Call the operations `ops`, which are to be refused."""
    found = Findings(group.rank)
    n, x = group.world_size, np.ones(group.world_size)
    peer = (group.rank + 1) % n
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: group.all_reduce(x),
        "reduce": lambda: group.reduce(x),
        "broadcast": lambda: group.broadcast(x),
        "all_gather": lambda: group.all_gather(x),
        "gather": lambda: group.gather(x),
        "scatter": lambda: group.scatter(x),
        "reduce_scatter": lambda: group.reduce_scatter(x),
        "all_to_all": lambda: group.all_to_all(x),
        "barrier": lambda: group.barrier(),
        "send": lambda: group.send(x, peer),
        "recv": lambda: group.recv(x, peer),
        "sendrecv": lambda: group.sendrecv(x, x.copy(), peer),
        "split": lambda: group.split(0),
        "subgroup": lambda: group.subgroup(range(n)),
    }
    for op in ops:
        if op not in calls:
            found.note(f"unsupported names {op!r}; there are: {', '.join(calls)}")
            continue
        try:
            calls[op]()
        except UnsupportedError:
            continue
        except FerroError as error:
            found.note(f"{op} is declared unsupported, but raised {type(error).__name__}: {error}")
        else:
            found.note(f"{op} is declared unsupported, but works")
    return found.report()
