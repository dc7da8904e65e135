"""One rank of `run_ranks`, as a process: `python -m ferro_testing.rank TASK REPORT`.

TASK is a file with what to do. REPORT takes what became of it: the number of a pipe's descriptor,
or, under a launcher that passes none on, a folder for files named by the rank. Task and reports are
encoded by `ferro.rendezvous.codec`.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import ferro
from ferro.rendezvous import codec
from ferro.runtime.environment import resolve
from ferro_testing.functions import load

Report: TypeAlias = Callable[[dict[str, object]], None]


def main(task_path: str, report_to: str) -> int:
    """Do the task; return the exit status."""
    report = _into_pipe(int(report_to)) if report_to.isdecimal() else _into_folder(Path(report_to))
    # At its deadline the parent sends SIGABRT, so that every thread's stack is in the output.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    task: Any = codec.decode(Path(task_path).read_bytes())
    try:
        function = load(task["function"])
        with ferro.init(task["backend"], **task["init_options"]) as group:
            result = codec.encode(function(group, *task["args"]))
            report({"result": result})
    except BaseException as error:
        text = "".join(traceback.format_exception(error)).encode(errors="replace").decode()
        report({"error_type": type(error).__name__, "error_text": text})
        if not isinstance(error, Exception):
            raise
        return 1
    return 0


def _into_pipe(pipe: int) -> Report:
    """Return what sends reports through a pipe; the last one counts."""

    def report(what: dict[str, object]) -> None:
        data = _encoded(what)
        data = len(data).to_bytes(8, "big") + data
        while data:
            data = data[os.write(pipe, data) :]

    return report


def _into_folder(folder: Path) -> Report:
    """Return what leaves reports as a file, the last one in place of others, whole.

    What this process prints goes into a file beside it, and so does its id.
    """
    rank = resolve().rank
    output = os.open(folder / f"output{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    _write(folder / f"pid{rank}", str(os.getpid()).encode())
    return lambda what: _write(folder / f"report{rank}", _encoded(what))


def _write(path: Path, data: bytes) -> None:
    draft = path.with_suffix(".draft")
    draft.write_bytes(data)
    draft.rename(path)


def _encoded(what: dict[str, object]) -> bytes:
    return codec.encode({**what, "ended_s": time.monotonic()})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
