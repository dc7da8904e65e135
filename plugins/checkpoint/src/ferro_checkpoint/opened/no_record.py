"""A directory without a record: why it is no checkpoint, for the message."""

from __future__ import annotations

import os

from ferro_checkpoint.errors import CheckpointIncomplete
from ferro_checkpoint.layout.bundle import SUFFIX
from ferro_checkpoint.layout.record import RECORD_NAME
from ferro_checkpoint.storage.saver import TOKEN_NAME
from ferro_checkpoint.storage.storage import Storage

_FOREIGN = "`ferro_checkpoint.formats` and `ferro checkpoint convert` read it"


def no_record(storage: Storage, name: str) -> CheckpointIncomplete:
    """Describe what is there in place of a checkpoint, as the error to raise."""
    path = f"{storage.path}/{name}"
    return CheckpointIncomplete(f"{path}: {_reason(storage, name, path)}", path=path)


def _reason(storage: Storage, name: str, path: str) -> str:
    files = storage.files(name)
    if not files and not storage.exists(name):
        return "there is nothing of this name"
    if os.path.isfile(path):
        if name.endswith(SUFFIX):
            return f"this is a safetensors file, and no checkpoint's directory; {_FOREIGN}"
        return "this is a file, and a checkpoint is a directory"
    if TOKEN_NAME in files:
        return "the save of this checkpoint goes on or was interrupted: load another one"
    within = sorted(inner for inner in files if os.path.isfile(f"{path}/{inner}/{RECORD_NAME}"))
    if within:
        return f"this is a directory of checkpoints, and none itself: choose one of {', '.join(within[-3:])}"
    if any(file.endswith(SUFFIX) for file in files):
        return (
            f"there are safetensors files and no {RECORD_NAME}: either a save was interrupted, and then load an older "
            f"checkpoint; or another program has written them, and then {_FOREIGN}"
        )
    if files:
        return f"there is no {RECORD_NAME}: the save did not end, or this is no checkpoint"
    return f"there is no {RECORD_NAME}: the directory is empty"
