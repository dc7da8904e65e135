"""Who failed first, and what the user is told about it."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ferro.launch.output import Console
from ferro.launch.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The failure that ended an attempt.

    Attributes:
        what: "rank 2 failed first: exit code 1", "the launcher of node 1 was stopped by SIGTERM".
        status: the exit status that `ferro run` takes over from it.
        after_s: seconds after the start of the attempt.
        consequence: the rank itself put it down to another rank.
        restart: whether starting again could help.
    """

    what: str
    status: int
    after_s: float
    consequence: bool = False
    restart: bool = True

    def to_json(self) -> bytes:
        """For another node's launcher."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Failure:
        """What another node's launcher sent."""
        return cls(**json.loads(data))


def first_failure(workers: Sequence[Worker]) -> Worker | None:
    """The rank that is to blame, or None where all ended well or as told.

    A rank that says it lost a peer comes after one that says anything else. A rank that was in
    the middle of its traceback when the launcher ended it counts too, after those that ended by
    themselves. Among equals the first sign of failure decides: the traceback's beginning, or
    else the end of the process.
    """
    failed = [w for w in workers if w.code and (w.told_at is None or _was_failing(w))]
    return min(failed, key=_blame, default=None)


def describe_failure(worker: Worker, started: float, *, alone: bool) -> Failure:
    """What is to be said of the rank that failed first, or that is `alone`."""
    code = worker.code or 0
    if worker.told_at is not None:
        code = 1  # the launcher's signal cut its traceback short; that ends with 1 in Python
    return Failure(
        what=f"rank {worker.rank} failed{'' if alone else ' first'}: {describe_code(code)}",
        status=exit_status(code),
        after_s=worker.ended_at - started,
        consequence=_blame(worker)[0],
    )


def describe_code(code: int) -> str:
    """An exit code, as `subprocess` gives it, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (", maybe out of memory" if name == "SIGKILL" else "")


def exit_status(code: int) -> int:
    """The exit status that stands for a `subprocess` exit code: 128 + n for signal n."""
    return code if code >= 0 else 128 - code


def show_failure(console: Console, workers: Sequence[Worker], first: Worker | None, failure: Failure) -> None:
    """Print the traceback of the rank that failed first, then who failed and how.

    Args:
        console: where to print.
        workers: this node's ranks, all ended.
        first: the one that failed first, or None where that was not a rank of this node.
        failure: what failed first in the whole job.
    """
    shown_now = first is not None and first.output.release()
    text = f"{failure.what} after {failure.after_s:.1f} s"
    if console.prefixed and first is not None and first.output.traceback.error and not shown_now:
        text += " (its traceback is above)"
    ended = [str(w.rank) for w in workers if w.told_at is not None and w is not first]
    if ended:
        text += f"; ended rank{'s' if len(ended) > 1 else ''} {', '.join(ended)}"
    console.say(text + ".")


def show_others(console: Console, workers: Sequence[Worker], *, verbose: bool) -> None:
    """Print a line for each rank that failed later, or had begun a traceback when it was ended.

    Args:
        console: where to print.
        workers: this node's ranks but the one that failed first.
        verbose: print their tracebacks, too.
    """
    for worker in workers:
        held = worker.output.traceback
        text = ""
        if worker.code and worker.told_at is None:
            text = f"rank {worker.rank} failed later: {describe_code(worker.code)}"
            text += f": {held.error}" if held.error else ""
        elif held.holding:
            text = f"rank {worker.rank} was ended in the middle of a traceback: {held.error}"
        if verbose:
            worker.output.release()
        if text:
            console.say(text)


def _was_failing(worker: Worker) -> bool:
    """Whether a traceback had begun, a moment before the launcher told the rank to end."""
    held = worker.output.traceback
    return held.holding and held.began is not None and worker.told_at is not None and held.began < worker.told_at


def _blame(worker: Worker) -> tuple[bool, bool, float]:
    """The smaller, the more this rank is to blame."""
    held = worker.output.traceback
    told = worker.told_at is not None
    sign = held.began if held.holding else None
    return (held.is_consequence() and (told or (worker.code or 0) > 0), told, worker.ended_at if sign is None else sign)
