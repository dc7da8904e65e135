"""How often this process was forked since ferro was imported: 0 in the one that imported it."""

from __future__ import annotations

import os

count = 0


def _count() -> None:
    global count
    count += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count)
