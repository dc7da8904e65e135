"""One rank of `run_ranks`, as a process: `python -m ferro.testing.rank TASK PIPE`.

TASK is a file with what to do, PIPE the file descriptor that takes the report; both are encoded
by `ferro.codec`.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import ferro
from ferro import codec
from ferro.testing.functions import load


def main(task_path: str, pipe: int) -> int:
    """Do the task; return the exit status."""
    # At its deadline the parent sends SIGABRT, so that every thread's stack is in the output.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    task: Any = codec.decode(Path(task_path).read_bytes())
    try:
        function = load(task["function"])
        with ferro.init(task["backend"], **task["init_options"]) as group:
            result = codec.encode(function(group, *task["args"]))
            _report(pipe, {"result": result})
    except BaseException as error:
        text = "".join(traceback.format_exception(error)).encode(errors="replace").decode()
        _report(pipe, {"error_type": type(error).__name__, "error_text": text})
        if not isinstance(error, Exception):
            raise
        return 1
    return 0


def _report(pipe: int, report: dict[str, object]) -> None:
    """Send a report; the last one counts."""
    data = codec.encode({**report, "ended_s": time.monotonic()})
    data = len(data).to_bytes(8, "big") + data
    while data:
        data = data[os.write(pipe, data) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
