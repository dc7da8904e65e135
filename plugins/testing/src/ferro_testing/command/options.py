"""The command line of `ferro conformance`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ferro.cli.parser import Parser
from ferro.errors import UsageError
from ferro.types import Device

_MAX_RANKS = 64
_EPILOG = """\
Every collective is called with every dtype and reduction, and compared bit for bit; then every
check of ferro_testing.conformance is run. What raises UnsupportedError on all ranks is a gap in
what the backend offers, shown with its reason. Wrong results, hangs and other errors are findings.

exit status: 0 nothing is wrong · 1 there are findings · 2 the backend cannot be used here
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConformanceOptions:
    """The options of `ferro conformance`.

    Attributes:
        backend: name of the backend.
        ranks: how many to start.
        quick: leave out the checks that the tables do not need.
        device: where the arrays of the collectives are, None for the backend's first.
        timeout_s: deadline of each run of the ranks in seconds.
        json: file for the findings, "-" for stdout, None for no file.
    """

    backend: str
    ranks: int = 4
    quick: bool = False
    device: Device | None = None
    timeout_s: float = 60.0
    json: str | None = None


def parse_options(arguments: Sequence[str]) -> ConformanceOptions:
    """Read the command line after `ferro conformance`.

    Raises:
        UsageError: an option is unknown or makes no sense.
    """
    given = _parser().parse_args(arguments)
    if not 2 <= given.ranks <= _MAX_RANKS:
        raise UsageError(f"-n {given.ranks}: give 2 to {_MAX_RANKS} ranks")
    if not 0 < given.timeout <= 3600:
        raise UsageError(f"--timeout {given.timeout:g}: give up to 3600 seconds")
    if given.json not in (None, "-") and not Path(given.json).absolute().parent.is_dir():
        raise UsageError(f"--json {given.json}: its directory does not exist; make it first")
    return ConformanceOptions(
        backend=given.backend,
        ranks=given.ranks,
        quick=given.quick,
        device=None if given.device is None else Device(given.device),
        timeout_s=given.timeout,
        json=given.json,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ferro conformance",
        usage="ferro conformance BACKEND [options]",
        description="Try an installed backend, and show what it does, refuses and gets wrong.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("backend", metavar="BACKEND", help="its name; `ferro backends` lists them")
    add("-n", "-np", dest="ranks", type=int, default=4, metavar="N", help="ranks (default 4)")
    add("--quick", action="store_true", help="only the checks that the tables need")
    add(
        "--device",
        choices=[str(device) for device in Device],
        help="where the collectives' arrays are (default: what the backend names first)",
    )
    add("--timeout", type=float, default=60.0, metavar="SECONDS", help="deadline of each run of the ranks (default 60)")
    add("--json", metavar="FILE", help="write what was found; - for stdout, the tables on stderr")
    return parser
