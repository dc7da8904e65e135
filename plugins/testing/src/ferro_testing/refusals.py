"""Conformance of refusals: wrong calls raise before data moves, and the group stays usable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ferro import ProcessGroup
from ferro.errors import FerroError, UnsupportedError, UsageError
from ferro.types import Array
from ferro_testing.case import Case
from ferro_testing.differences import FEATURES
from ferro_testing.samples import DTYPES, Findings, known, preferred, reductions
from ferro_testing.single_call import call_once

# Features with a call that a backend can refuse.
_PROVABLE = ("functions", "uneven", "shrink")
_FOR_TWO = ("send", "recv", "sendrecv", "shrink")
_SHORT_S = 5.0  # timeout of a call that should be refused, but may hang


def check_usage_errors(case: Case) -> None:
    """Every wrong call raises UsageError or UnsupportedError and leaves the group usable."""
    if case.supports("all_reduce"):
        case.verify_all(_misuse)


def check_unsupported(case: Case) -> None:
    """An operation that is declared unsupported raises UnsupportedError on every rank."""
    declared = [key for key in case.unsupported if key.partition(":")[0] not in FEATURES]
    declared += [key for key in _PROVABLE if key in case.unsupported]
    declared = [key for key in declared if _has_dtypes(key)]
    if case.largest == 1:  # one rank has no peer to send to or to lose
        declared = [key for key in declared if key.partition(":")[0] not in _FOR_TWO]
    if declared:
        case.verify(_call_unsupported, case.largest, declared, list(case.dtypes))
    if "deterministic" in case.unsupported and case.supports("all_reduce"):
        _require_refusal(case)


def _has_dtypes(key: str) -> bool:
    """Say whether the dtypes that a key names are installed."""
    names = key.split(":")
    return len(known(names)) == len(names)


def _require_refusal(case: Case) -> None:
    """Prove that deterministic=True is refused, by `ferro.init` or by the collective."""
    outcomes = case.outcomes(_add, case.largest, deterministic=True)
    for outcome in outcomes:
        refused = ("UnsupportedError", "BackendUnavailable", "UsageError")
        assert outcome.error_type in refused, (
            f"deterministic is declared unsupported, but is not refused on {case.backend}: {outcome.describe()}"
        )


def _add(group: ProcessGroup) -> None:
    group.all_reduce(np.ones(3))


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


def _call_unsupported(group: ProcessGroup, keys: Sequence[str], dtypes: Sequence[str]) -> list[str]:
    """Make the calls that `keys` declare and that are to be refused; shrink last, since it needs a dead group."""
    found = Findings(group.rank)
    for key in sorted(keys, key=lambda key: key == "shrink"):
        try:
            _refused(group, key, dtypes)()
        except UnsupportedError:
            continue
        except FerroError as error:
            kind = type(error).__name__
            found.note(f"{key} is declared unsupported, but raised {kind}: {error}")
        else:
            found.note(f"{key} is declared unsupported, but works")
    return found.report()


def _refused(group: ProcessGroup, key: str, dtypes: Sequence[str]) -> Callable[[], object]:
    """Return the call that a key says is refused."""
    op, *details = key.split(":")
    others: dict[str, Callable[[], object]] = {
        "functions": lambda: group.all_reduce(np.ones(3), _second),
        "uneven": lambda: _use_sizes(group),
        "shrink": lambda: _shrink(group),
        "barrier": lambda: group.barrier(),
        "split": lambda: group.split(0),
        "subgroup": lambda: group.subgroup(range(group.world_size)),
    }
    if op in others:
        return others[op]
    dtype, reduction = _operands(details, dtypes)
    return lambda: call_once(group, op, dtype, reduction, timeout_s=_SHORT_S)


def _operands(details: Sequence[str], dtypes: Sequence[str]) -> tuple[str, str]:
    """Return the dtype and the reduction that a key names, or defaults that go with it."""
    named = [name for name in details if name in DTYPES]
    reduction = next((name for name in details if name not in DTYPES), "sum")
    fitting = [dtype for dtype in dtypes if reduction in reductions(dtype)]
    return (named or [preferred("float32", fitting)])[0], reduction


def _second(a: Array, b: Array, out: Array) -> None:
    np.copyto(out, b)


def _use_sizes(group: ProcessGroup) -> None:
    """Call all operations that take sizes, until one refuses them."""
    n, me = group.world_size, group.rank
    sizes = [rank + 1 for rank in range(n)]
    mine, whole = np.ones(sizes[me]), np.ones(sum(sizes))
    group.all_gather(mine, sizes=sizes)
    group.gather(mine, sizes=sizes)
    group.scatter(whole, sizes=sizes)
    group.reduce_scatter(whole, sizes=sizes)
    group.all_to_all(whole, send_sizes=sizes)


def _shrink(group: ProcessGroup) -> object:
    group.abort()
    return group.shrink(timeout_s=_SHORT_S)
