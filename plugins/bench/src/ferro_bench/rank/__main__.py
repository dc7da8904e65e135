"""One rank of one library: carry out the driver's orders until it says "end" or is gone.

    python -m ferro_bench.rank TASK LIBRARY [RANK | COLLECTIVE=ALGORITHM ...]

TASK is the file that the driver wrote for this world; the pairs say which algorithms ferro is to use. During other
libraries' turns this process waits in `recv` and uses no CPU time.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from .buffers import Buffers
from .case import BenchCase
from .channel import Channel
from .library import MeasuredLibrary, open_library
from .turn import PreparedCase, allocate

_LEAVE_S = 3.0


def main() -> None:
    """Run the rank."""
    task = json.loads(Path(sys.argv[1]).read_text())
    more = sys.argv[3:]
    task["algorithms"] = dict(pair.split("=") for pair in more if "=" in pair)
    rank = int(more[0]) if more and not task["algorithms"] else 0
    library = open_library(sys.argv[2], task, rank, task["world_size"])
    channel = Channel(task["host"], task["port"], bytes.fromhex(task["secret"]))
    channel.send(
        {"world": task["world"], "rank": library.rank, "world_size": library.world_size, "version": library.version}
    )
    try:
        _serve(channel, library)
    except ConnectionError:
        # The driver left or died. Some libraries clean up only where all ranks leave in order;
        # but others may be dead or in the middle of a call, so this rank does not wait for long.
        hurry = threading.Timer(_LEAVE_S, os._exit, (1,))
        hurry.daemon = True
        hurry.start()
    library.close()


def _serve(channel: Channel, library: MeasuredLibrary) -> None:
    """Carry out orders until the driver says "end".

    Raises:
        ConnectionError: the driver left without saying so.
    """
    prepared: dict[str, PreparedCase] = {}
    memories: dict[str, list[Buffers]] = {}  # ordinary and persistent calls take turns in the same memory
    while (order := channel.receive())["do"] != "end":
        reply: dict[str, Any] = {}
        if order["do"] == "prepare":
            case, memory = BenchCase(**order["case"]), order["memory"]
            if memory not in memories:
                memories[memory] = allocate(library, case, memory)
            prepared[order["slot"]] = PreparedCase(library, case, memories[memory], persistent=order["persistent"])
        elif order["do"] == "turn":
            reply = prepared[order["slot"]].run(order["turn"])
        elif order["do"] == "release":
            for one in prepared.values():
                one.release()
            prepared.clear()
            memories.clear()
        channel.send(reply)


if __name__ == "__main__":
    main()
