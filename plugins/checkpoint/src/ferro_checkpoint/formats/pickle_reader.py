"""Read a pickle without the pickle module: plain values, and the names of a list that the caller gives.

No class of any module is imported, and no function is called but those that the caller names. Every instruction of
the pickle makes one small object at most, so memory and time are proportional to its length, which is bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.formats.pickle_machine import PickleMachine, Refusal
from ferro_checkpoint.formats.pickle_names import Names

MOST_PICKLE_BYTES = 256 << 20


class RefusedPickle(CheckpointDamaged):
    """The pickle holds what is not on the list, or is none."""


def read_pickle(data: bytes, names: Names, path: str, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read a pickle.

    Args:
        data: the pickle, which ends with its STOP instruction.
        names: the names that may come in it.
        path: for messages.
        persistent: makes an object of a persistent id; None: there must be no such ids.

    Raises:
        RefusedPickle: a name or an instruction is not allowed, or it is no pickle.
    """
    if len(data) > MOST_PICKLE_BYTES:
        text = f"{path}: a pickle of {len(data)} bytes is not read, only up to {MOST_PICKLE_BYTES}"
        raise RefusedPickle(text, path=path)
    machine = PickleMachine(data, names, persistent)
    try:
        return machine.run()
    except Refusal as error:
        text = f"{path}: at byte {machine.position} of its pickle: {error}"
        raise RefusedPickle(text, path=path) from error
    except (IndexError, struct.error, UnicodeDecodeError, TypeError, ValueError, KeyError, OverflowError) as error:
        text = f"{path}: at byte {machine.position}: this is no pickle: {error}"
        raise RefusedPickle(text, path=path) from error
