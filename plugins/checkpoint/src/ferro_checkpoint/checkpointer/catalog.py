"""Catalog: the checkpoints of a checkpointer in its directory, and which of them are to go."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection

from ferro_checkpoint.checkpointer.keep import KeepPolicy, Saved
from ferro_checkpoint.errors import CheckpointError
from ferro_checkpoint.layout.record import MOST_RECORD_BYTES, RECORD_NAME, Record
from ferro_checkpoint.storage.storage import Storage

_NAME = re.compile(r"step-([0-9]{9,})")
_LOG = logging.getLogger("ferro.checkpoint")
METRICS = "metrics"  # where they are in the record's `saved_by`


def name_of(step: int) -> str:
    """Name the checkpoint of a step."""
    return f"step-{step:09}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint that a checkpointer has named; None for another name."""
    found = _NAME.fullmatch(name)
    return None if found is None or name != name_of(int(found[1])) else int(found[1])


class Catalog:
    """Knows the checkpoints in a directory; rank 0 has it."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[str, Saved] = {}
        self._new: list[str] = []  # what was saved here, in that order
        self._lock = threading.Lock()

    @property
    def path(self) -> str:
        """The directory."""
        return self._storage.path

    def steps(self) -> list[tuple[int, str]]:
        """List the steps that have a directory, whole or not, the newest first, and its name."""
        found = [(step, name) for name in self._storage.names() if (step := step_of(name)) is not None]
        return sorted(found, reverse=True)

    def committed(self) -> list[Saved]:
        """List the checkpoints that have a commit record, in the order in which they were saved.

        That is not the order of their steps where a training has gone back to an earlier step. Clocks may differ, so
        what was saved here comes last in any case. Each record is read once.
        """
        with self._lock:
            known: dict[str, Saved] = {}
            for step, name in reversed(self.steps()):
                one = self._known.get(name) or self._read(step, name)
                if one is not None:
                    known[name] = one
            self._known = known
            orders = {name: order for order, name in enumerate(self._new)}
            return sorted(known.values(), key=lambda one: (orders.get(one.name, -1), one.time, one.step))

    def forget(self, name: str) -> None:
        """Forget what its record said: it is written again."""
        with self._lock:
            self._known.pop(name, None)

    def remove_others(self, keep: KeepPolicy, newest: str, damaged: Collection[str] = ()) -> list[str]:
        """Remove what a policy does not keep, but never the newest; those known to be damaged stay and do not count.

        A directory that cannot be removed stays, and a warning is logged: the save itself was good.

        Returns:
            the names of the removed ones.
        """
        with self._lock:
            self._new = [*(name for name in self._new if name in self._known and name != newest), newest]
        saved = [one for one in self.committed() if one.name not in damaged]
        stay = keep.kept(saved) | {newest}
        removed: list[str] = []
        for one in saved:
            if one.name in stay:
                continue
            try:
                self._storage.remove(one.name)
            except Exception as error:  # noqa: BLE001 - whatever the store raises
                _LOG.warning("%s/%s could not be removed: %s", self._storage.path, one.name, error)
            else:
                removed.append(one.name)
                self.forget(one.name)
        return removed

    def _read(self, step: int, name: str) -> Saved | None:
        path = f"{self._storage.path}/{name}/{RECORD_NAME}"
        try:
            record = Record.decode(self._storage.read_file(name, RECORD_NAME, MOST_RECORD_BYTES), path)
        except (OSError, CheckpointError):
            return None  # it is no whole checkpoint, or none that this version knows
        given = record.saved_by.get(METRICS)
        metrics = given.items() if isinstance(given, dict) else ()
        numbers = {key: float(value) for key, value in metrics if isinstance(value, int | float)}
        time = record.saved_by.get("time")
        return Saved(name, step, numbers, float(time) if isinstance(time, int | float) else 0.0)
