"""The real command ends quietly where nobody reads its output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_reader_that_has_gone(checkpoint):
    ferro = Path(sys.executable).parent / "ferro"
    process = subprocess.Popen(
        [ferro, "checkpoint", "inspect", checkpoint], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    error = process.stderr.read()
    assert (process.wait(60), error) == (1, "")
    process.stderr.close()
