"""Join the ranks' trace parts to one Chrome trace."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def part_path(directory: Path, rank: int) -> Path:
    """Where a rank writes its part: {"traceEvents": [...]}."""
    return directory / f"rank{rank}.json"


def merge_parts(directory: Path, ranks: Iterable[int], target: Path) -> list[str]:
    """Write the events of all parts to `target`, which appears whole or not at all.

    Args:
        directory: where the parts are.
        ranks: whose parts to look for.
        target: the file to write.

    Returns:
        What is amiss, a line for each part that is absent or malformed; such parts are left out.

    Raises:
        OSError: `target` cannot be written.
    """
    amiss = []
    events: list[object] = []
    for rank in ranks:
        try:
            part = json.loads(part_path(directory, rank).read_bytes())
            found = part["traceEvents"]
            if not isinstance(found, list):
                raise TypeError("traceEvents is not a list")
        except FileNotFoundError:
            amiss.append(f"rank {rank} wrote no trace: it made no collective call, or ended badly")
        except (OSError, ValueError, KeyError, TypeError) as exc:
            amiss.append(f"the trace of rank {rank} is left out, it is malformed: {exc!r}")
        else:
            events += found
    _write_atomically(target, json.dumps({"traceEvents": events}))
    return amiss


def _write_atomically(target: Path, text: str) -> None:
    descriptor, draft = tempfile.mkstemp(dir=target.absolute().parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        # mkstemp makes files that only the owner can read; a trace is an ordinary file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(draft, 0o666 & ~mask)
        os.replace(draft, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
