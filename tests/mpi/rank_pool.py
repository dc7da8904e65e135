"""Ranks under one mpiexec that carry out task after task, as starting them takes longer than most checks.

Run as a program, `rank_pool.py FOLDER` is one of the ranks: it waits for FOLDER/0, FOLDER/1, … to be made, and does in
each what `python -m ferro_testing.rank` does in a folder of its own. FOLDER/end ends it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from ferro.group import codec
from ferro_testing import rank
from ferro_testing.functions import locate
from ferro_testing.outcome import Outcome

_POLL_S = 0.005
_MOST_POLL_S = 0.05  # of ranks that have nothing to do for long
_END_S = 30.0


class RankPool:
    """The ranks of one mpiexec, for tasks that all of them carry out well; leaving the context ends them.

    Raises:
        AssertionError: on leaving, if ranks that carried out all tasks well do not end well.
    """

    def __init__(self, command: Sequence[str], python: str, world_size: int) -> None:
        """Say how mpiexec is called; it is started by the first task, and again after one that went wrong."""
        self._command = (*command, python, __file__)
        self._world_size = world_size
        self._outputs = {"launcher", *(f"output{rank}" for rank in range(world_size))}
        self._process: subprocess.Popen[bytes] | None = None
        self._tasks = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        status, printed = self._end()
        assert status == 0, f"mpiexec left with exit status {status}: {printed}"

    def runner(
        self,
        function: Callable[..., object],
        world_size: int,
        args: Sequence[object],
        *,
        timeout_s: float,
        deterministic: bool,
    ) -> list[Outcome]:
        """See `ferro_testing.conformance.Runner`."""
        assert world_size == self._world_size
        return self.outcomes(function, args, timeout_s=timeout_s, init_options={"deterministic": deterministic})

    def outcomes(
        self,
        function: Callable[..., object],
        args: Sequence[object],
        *,
        timeout_s: float,
        init_options: Mapping[str, object],
    ) -> list[Outcome]:
        """Run `function(group, *args)` on the ranks; return each rank's outcome."""
        if self._process is None:
            self._start()
        options = dict(init_options)
        task = {"function": locate(function), "backend": "mpi", "args": list(args), "init_options": options}
        folder = self._folder / str(next(self._tasks))
        draft = folder.with_suffix(".draft")
        draft.mkdir()
        (draft / "task").write_bytes(codec.encode(task))
        draft.rename(folder)
        deadline = time.monotonic() + timeout_s
        reports = [folder / f"report{rank}" for rank in range(self._world_size)]
        while not all(report.exists() for report in reports) and time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            time.sleep(_POLL_S)
        outcomes = [self._outcome(folder, rank) for rank in range(self._world_size)]
        if not all(outcome.ok for outcome in outcomes):
            self._end()
        return outcomes

    def _outcome(self, folder: Path, rank: int) -> Outcome:
        output = folder / f"output{rank}"
        printed = output.read_text(errors="replace") if output.exists() else ""
        try:
            report: Any = codec.decode((folder / f"report{rank}").read_bytes())
        except FileNotFoundError:
            printed += (self._folder / "launcher").read_text(errors="replace")
            return Outcome(rank=rank, error_type="Late", error_text="did not report in time", output=printed)
        result = codec.decode(report["result"]) if "result" in report else None
        return Outcome(
            rank=rank,
            result=result,
            error_type=report.get("error_type", ""),
            error_text=report.get("error_text", ""),
            output=printed,
        )

    def _start(self) -> None:
        self._resources = ExitStack()
        self._folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="ferro-pool-")))
        self._tasks = itertools.count()
        output = self._resources.enter_context((self._folder / "launcher").open("wb"))
        self._process = subprocess.Popen(
            (*self._command, str(self._folder)),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def _end(self) -> tuple[int, str]:
        """End the ranks well where they can, otherwise by mpiexec's own way; return its status and all output."""
        if self._process is None:
            return 0, ""
        (self._folder / "end").touch()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(_END_S)
        status = self._process.returncode
        printed = "".join(
            path.read_text(errors="replace") for path in self._folder.rglob("*") if path.name in self._outputs
        )
        self._process = None
        self._resources.close()
        return status, printed


def main(folder_path: str) -> int:
    """Be one rank of a pool; return the exit status."""
    folder, parent = Path(folder_path), os.getppid()
    for number in itertools.count():
        task, pause_s = folder / str(number), _POLL_S
        while not task.exists():
            if (folder / "end").exists() or os.getppid() != parent:
                return 0
            time.sleep(pause_s)
            pause_s = min(1.1 * pause_s, _MOST_POLL_S)
        if rank.main(str(task / "task"), str(task)):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
