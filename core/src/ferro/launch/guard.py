"""What ends the ranks when the launcher itself is killed and can no longer do it.

Two small programs, run by a bare interpreter (`-I -S`: no site, no environment):

- the *starter* becomes a rank: it asks Linux to kill it when the launcher dies, then executes
  the user's program in its place;
- the *guard*, one per attempt, waits for the end of a pipe that only the launcher holds open,
  and then kills what is left of the ranks' process groups: grandchildren too, and on any POSIX
  system.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence

_BARE_PYTHON = ("-I", "-S", "-c")

_STARTER = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)  # the launcher died before the request above could see it
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""

_GUARD = """
import os, signal, sys
groups = {int(argument) for argument in sys.argv[1:]}
for line in sys.stdin:
    groups.discard(int(line))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


def starter_command(python_arguments: Sequence[str]) -> list[str]:
    """The command that runs this interpreter with `python_arguments` and dies with the launcher."""
    return [sys.executable, *_BARE_PYTHON, _STARTER, str(os.getpid()), *python_arguments]


class Guard:
    """Kills process groups when this process dies, however it dies."""

    def __init__(self, groups: Sequence[int]) -> None:
        """Start guarding.

        Args:
            groups: process group ids.
        """
        self._process = subprocess.Popen(  # noqa: S603 - our own program, fixed arguments
            [sys.executable, *_BARE_PYTHON, _GUARD, *map(str, groups)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def forget(self, group: int) -> None:
        """No longer guard a group that is gone: its number may be given to others."""
        assert self._process.stdin is not None
        # Without a guard the ranks still have their starter's request.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"%d\n" % group)
            self._process.stdin.flush()

    def close(self) -> None:
        """Stop guarding; kills nothing."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
