"""The processes of one `run_ranks`: started, watched until all have ended, ended by force.

Every rank leaves files in the run's private folder, named by the rank: its report, its output, its process id. The
ranks of a launcher such as mpiexec, which mixes their output, meet as they would under the launcher alone, since
no FERRO_STORE is set.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ferro.group import codec
from ferro.launch.processes import ChildProcess, Supervisor
from ferro.rendezvous import StoreServer
from ferro.runtime.environment import Address, LaunchInfo, child_environment
from ferro_testing.forked_ranks import ForkedRank, ForkedRanks, can_fork
from ferro_testing.outcome import Outcome

_GRACE_S = 5.0  # how long the others may take to end after one has failed
_REAP_S = 5.0  # how long a process may take to end after a signal
_POLL_S = 0.02  # between two looks at the reports of a launcher's ranks
_OUTPUT_BYTES = 8 * 1024
# Variables that tell a process its rank; a launcher's ranks must receive them from the launcher.
_PLACE = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "FERRO_STORE"),
    *("MASTER_ADDR", "MASTER_PORT", "FERRO_MASTER_PORT", "FERRO_RESTART"),
)


def run_processes(
    task: Mapping[str, object],
    variables: Sequence[Mapping[str, str]],
    *,
    timeout_s: float,
    python: str,
    stop_on_failure: bool,
) -> list[Outcome]:
    """Run each rank as a process of ours; return the outcomes by rank.

    Args:
        task: encoded for every rank.
        variables: set for each rank besides this process's own environment.
        timeout_s: deadline of the whole run.
        python: the ranks' interpreter.
        stop_on_failure: once a rank has failed, the others have only a few seconds.
    """
    deadline = time.monotonic() + timeout_s
    secret = secrets.token_bytes(32)
    failed: list[int] = []
    with _folder(task) as folder, StoreServer(secret=secret) as server:
        environments = [
            {**child_environment(_place(rank, len(variables), server.address, secret), timeout_s=timeout_s), **extra}
            for rank, extra in enumerate(variables)
        ]
        fork = can_fork(python, environments)

        def note_end(rank: int, child: ChildProcess | ForkedRank) -> None:
            if child.returncode != 0 or "result" not in _report(folder, rank):
                failed.append(rank)

        with ForkedRanks(environments[0]) if fork else Supervisor() as supervisor:
            for rank, env in enumerate(environments):
                arguments, on_end = [str(folder / "task"), str(folder), str(rank)], partial(note_end, rank)
                if isinstance(supervisor, ForkedRanks):
                    supervisor.start(arguments, env=env, on_end=on_end)
                    continue
                command = [python, "-m", "ferro_testing.rank", *arguments]
                with (folder / f"output{rank}").open("wb") as output:
                    supervisor.start(command, stdout=output, env=env, on_end=on_end)
            late_because = _wait(supervisor, deadline, timeout_s, lambda: stop_on_failure and failed)
            late: Sequence[ChildProcess | ForkedRank] = supervisor.running()
            for child in late:
                child.signal_group(signal.SIGABRT)  # so that every stack is in its output
            supervisor.wait_all(_REAP_S)
            supervisor.end(signal.SIGKILL, grace_s=0.0)  # ranks may have left processes behind
            children: Sequence[ChildProcess | ForkedRank] = supervisor.children
            return [
                _process_outcome(folder, rank, child, late_because if child in late else "")
                for rank, child in enumerate(children)
            ]


def _place(rank: int, world_size: int, store: Address, secret: bytes) -> LaunchInfo:
    """Describe the place of a rank that is started here."""
    return LaunchInfo(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        launcher="ferro",
        store=store,
        secret=secret,
    )


def _process_outcome(folder: Path, rank: int, child: ChildProcess | ForkedRank, late_because: str) -> Outcome:
    report, code = _report(folder, rank), child.returncode
    ended_by = signal.Signals(-code).name if code is not None and code < 0 else ""
    kind, text = str(report.get("error_type", "")), str(report.get("error_text", ""))
    if late_because:
        kind, text, ended_by = "Late", f"{late_because}. {text}", ""
    elif not kind and ended_by:
        kind, text = "Killed", f"ended by {ended_by}"
    elif not kind and (code or "result" not in report):
        kind, text = "Exited", f"left with exit status {code}"
    return _outcome(
        rank,
        report,
        kind,
        text,
        exit_code=code if code is not None and code >= 0 else None,
        ended_by=ended_by,
        ended_s=child.ended_at or time.monotonic(),
        output=_tail(folder / f"output{rank}"),
    )


def run_launcher(
    task: Mapping[str, object],
    world_size: int,
    launcher: Sequence[str],
    variables: Mapping[str, str],
    *,
    timeout_s: float,
    python: str,
    stop_on_failure: bool,
) -> list[Outcome]:
    """Run the ranks under a launcher; return the outcomes by rank.

    Args:
        task: encoded for every rank.
        world_size: number of ranks.
        launcher: the command that starts a program on so many ranks, up to that program.
        variables: set for the launcher besides this process's own environment.
        timeout_s: deadline of the whole run.
        python: the ranks' interpreter.
        stop_on_failure: once a rank has failed, the others have only a few seconds.
    """
    deadline = time.monotonic() + timeout_s
    place = LaunchInfo(
        rank=0,
        world_size=world_size,
        local_rank=0,
        local_world_size=world_size,
        launcher="",
        secret=secrets.token_bytes(32),
    )
    env = child_environment(place, timeout_s=timeout_s)
    env = {**{name: value for name, value in env.items() if name not in _PLACE}, **variables}
    ranks = range(world_size)
    with _folder(task) as folder, Supervisor() as supervisor:
        with (folder / "launcher").open("wb") as output:
            rank_command = [python, "-m", "ferro_testing.rank", str(folder / "task"), str(folder)]
            child = supervisor.start([*launcher, *rank_command], stdout=output, env=env)

        def failed() -> bool:
            return stop_on_failure and any("error_type" in _report(folder, rank) for rank in ranks)

        late: set[int] = set()
        try:
            late_because = _wait(supervisor, deadline, timeout_s, failed, poll_s=_POLL_S)
            if supervisor.running():
                late = {rank for rank in ranks if not _report(folder, rank)}
                _signal_ranks(folder, ranks, signal.SIGABRT)  # so that every stack is in its output
                supervisor.wait_all(_REAP_S)
        finally:  # a launcher that is asked to end ends its ranks; ranks that remain are killed
            if supervisor.running():
                child.signal_group(signal.SIGTERM)
                if not supervisor.wait_all(_REAP_S):
                    _signal_ranks(folder, ranks, signal.SIGKILL)
            supervisor.end(signal.SIGKILL, grace_s=0.0)
        reports = [_report(folder, rank) for rank in ranks]
        all_well = all("result" in report for report in reports)
        return [
            _launched_outcome(
                folder, rank, reports[rank], child.returncode, late_because if rank in late else "", all_well=all_well
            )
            for rank in ranks
        ]


def _launched_outcome(
    folder: Path, rank: int, report: dict[str, Any], code: int | None, late_because: str, *, all_well: bool
) -> Outcome:
    """Make the outcome of a rank without its exit status.

    Where the launcher failed and no rank reports a failure, any rank may have failed.
    """
    kind, text = str(report.get("error_type", "")), str(report.get("error_text", ""))
    ended_by, launcher_output = "", ""
    exit_code: int | None = 1 if kind else 0
    if late_because:
        kind, text, exit_code = "Late", f"{late_because}. {text}", None
    elif not kind and ("result" not in report or (code and all_well)):
        launcher_output = _tail(folder / "launcher")
        ended_by = _signal_in(code, launcher_output)
        kind, text, exit_code = "Exited", f"the launcher left with exit status {code}", code
        if ended_by:
            kind, text, exit_code = "Killed", f"the launcher tells of {ended_by}", None
    return _outcome(
        rank,
        report,
        kind,
        text,
        exit_code=exit_code,
        ended_by=ended_by,
        ended_s=time.monotonic(),
        output=_tail(folder / f"output{rank}") + launcher_output,
    )


def _outcome(
    rank: int,
    report: dict[str, Any],
    kind: str,
    text: str,
    *,
    exit_code: int | None,
    ended_by: str,
    ended_s: float,
    output: str,
) -> Outcome:
    raw = report.get("result")
    return Outcome(
        rank=rank,
        result=codec.decode(raw) if isinstance(raw, bytes) and not kind else None,
        error_type=kind,
        error_text=text,
        exit_code=exit_code,
        signal=ended_by,
        ended_s=float(report.get("ended_s", ended_s)),
        output=output,
    )


@contextlib.contextmanager
def _folder(task: Mapping[str, object]) -> Iterator[Path]:
    """Make the private folder of one run, with the encoded task in it."""
    encoded = codec.encode(dict(task))
    with tempfile.TemporaryDirectory(prefix="ferro-ranks-") as name:
        (Path(name) / "task").write_bytes(encoded)
        yield Path(name)


def _wait(
    supervisor: Supervisor | ForkedRanks,
    deadline: float,
    timeout_s: float,
    failed: Callable[[], object],
    poll_s: float = math.inf,
) -> str:
    """Wait until all processes have ended, or until a deadline that comes early once a rank has failed.

    Returns:
        The reason why a process that still runs is late.
    """
    early = False
    while supervisor.running() and (left_s := deadline - time.monotonic()) > 0:
        supervisor.wait(min(left_s, poll_s))
        if not early and failed():
            early, deadline = True, min(deadline, time.monotonic() + _GRACE_S)
    if early:
        return f"was ended {_GRACE_S:g} s after another rank had failed"
    return f"did not end within {timeout_s:g} s"


def _report(folder: Path, rank: int) -> dict[str, Any]:
    """Read the last report of a rank, {} where it has made none."""
    try:
        found = codec.decode((folder / f"report{rank}").read_bytes())
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}


def _tail(output: Path) -> str:
    data = output.read_bytes() if output.exists() else b""
    text = data[-_OUTPUT_BYTES:].decode(errors="replace")
    return f"… {text}" if len(data) > _OUTPUT_BYTES else text


def _signal_ranks(folder: Path, ranks: Sequence[int], signum: signal.Signals) -> None:
    """Send a signal to a launcher's ranks: SIGKILL to all, others to those that have not reported.

    Launchers may put ranks into their own process groups or sessions. Ids are not reused while the launcher runs.
    """
    for rank in ranks:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            pid = int((folder / f"pid{rank}").read_bytes())
            if not _report(folder, rank) or signum == signal.SIGKILL:
                os.kill(pid, signum)


def _signal_in(code: int | None, words: str) -> str:
    """Find the signal that ended a rank in the launcher's exit status or its output."""
    if code is not None and code > 128:
        number = code - 128
    elif found := re.search(r"signal (\d+)", words):
        number = int(found[1])
    else:
        return ""
    return signal.Signals(number).name if number in set(signal.Signals) else ""
