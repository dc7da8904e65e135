"""One rank of `run_ranks`, as a process: `python -m ferro_testing.rank TASK FOLDER [RANK]`.

TASK is a file that names the function and its arguments. FOLDER takes this rank's files (report, output and process
id), named by RANK, which under a launcher the environment tells. Task and report are encoded by `ferro.group.codec`.
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
from ferro.group import codec
from ferro.runtime.environment import resolve
from ferro_testing.functions import load


def main(task_path: str, folder_path: str, rank_text: str | None = None) -> int:
    """Carry out the task; return the exit status."""
    folder = Path(folder_path)
    rank = resolve().rank if rank_text is None else int(rank_text)
    output = os.open(folder / f"output{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    _write(folder / f"pid{rank}", str(os.getpid()).encode())

    def report(**content: object) -> None:
        """Write the report; the last one counts."""
        _write(folder / f"report{rank}", codec.encode({**content, "ended_s": time.monotonic()}))

    # At its deadline the parent sends SIGABRT, so that every thread's stack is in the output.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    task: Any = codec.decode(Path(task_path).read_bytes())
    try:
        function = load(task["function"])
        with ferro.init(task["backend"], **task["init_options"]) as group:
            result = codec.encode(function(group, *task["args"]))
            report(result=result)
    except BaseException as error:
        text = "".join(traceback.format_exception(error)).encode(errors="replace").decode()
        report(error_type=type(error).__name__, error_text=text)
        if not isinstance(error, Exception):
            raise
        return 1
    return 0


def _write(path: Path, data: bytes) -> None:
    draft = path.with_suffix(".draft")
    draft.write_bytes(data)
    draft.rename(path)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
