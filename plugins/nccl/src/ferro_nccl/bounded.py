"""A call into C that may never return, made so that its caller does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def bounded(function: Callable[[], Result], deadline: float, what: str) -> Result:
    """Call `function` in a thread of its own; return its result or raise its error.

    Args:
        function: what may block for ever.
        deadline: absolute `time.monotonic()` second.
        what: what it does, for the message.

    Raises:
        TimeoutError: it has not ended by then. Its thread is left behind.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - raised by the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name=f"ferro-nccl-{what}", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # from Python 3.12 on none may start in an exit handler
        run()
    else:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"{what} did not end by its deadline")
    return results[0]
