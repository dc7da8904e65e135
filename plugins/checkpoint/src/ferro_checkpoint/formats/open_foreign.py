"""Recognise a format by what is there, and open it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Literal

from ferro_checkpoint.errors import CheckpointError, StateError
from ferro_checkpoint.formats import rank_files, torch_checkpoint
from ferro_checkpoint.formats.rank_files import RankFilesSource
from ferro_checkpoint.formats.safetensors_source import INDEX_SUFFIX, SafetensorsSource
from ferro_checkpoint.formats.source import TensorSource
from ferro_checkpoint.formats.torch_checkpoint import TorchCheckpoint
from ferro_checkpoint.formats.torch_metadata import rank_metadata_names
from ferro_checkpoint.layout.bundle import SUFFIX
from ferro_checkpoint.layout.record import RECORD_NAME

Format = Literal["safetensors", "torch", "ferrotorch"]

_OPENERS: Mapping[str, Callable[[str], TensorSource]] = {
    "safetensors": SafetensorsSource,
    "torch": TorchCheckpoint,
    "ferrotorch": RankFilesSource,
}


_ADVICE = "name the format if it is one of them (--from safetensors of `convert`, format='safetensors' in Python)"


def open_foreign(path: str | os.PathLike[str], format: Format | None = None) -> TensorSource:  # noqa: A002
    """Open tensors that another program has written; nothing of them is executed.

    Args:
        path: a .safetensors file, a .safetensors.index.json, a directory of such files, a directory of
            torch.distributed.checkpoint (or a metadata file in it), or a directory of the crate
            ferrotorch-distributed.
        format: "safetensors", "torch" (torch.distributed.checkpoint) or "ferrotorch" (the crate's); None: found out.

    Raises:
        StateError: no format has this name.
        CheckpointError: nothing is there, or no format is recognised; the message lists what was looked for.
        CheckpointDamaged: the files are not what their format demands.
    """
    name = os.fspath(path)
    if format is not None and format not in _OPENERS:
        raise StateError(f"format {format!r} is none: give one of {', '.join(_OPENERS)}, or None")
    if not os.path.exists(name):
        raise CheckpointError(f"{name} does not exist", path=name)
    return _OPENERS[format or _recognised(name)](name)


def _recognised(path: str) -> Format:
    if not os.path.isdir(path):
        if path.endswith((SUFFIX, INDEX_SUFFIX)):
            return "safetensors"
        if path.endswith(torch_checkpoint.METADATA_NAME):
            return "torch"
        text = f"the names of files that are read end with {SUFFIX}, {INDEX_SUFFIX} or {torch_checkpoint.METADATA_NAME}"
        raise CheckpointError(f"{path}: {text}; {_ADVICE}", path=path)
    try:
        names = set(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", path=path) from error
    if RECORD_NAME in names:
        text = f"has {RECORD_NAME}: it is a checkpoint of ferro: load it with ferro_checkpoint.load"
        raise CheckpointError(
            f"{path} {text}, or pass format='safetensors' and the path of one of its files", path=path
        )
    if torch_checkpoint.METADATA_NAME in names or rank_metadata_names(path):
        return "torch"
    if rank_files.METADATA_NAME in names and "rank_0.safetensors" in names:
        return "ferrotorch"
    if any(one.endswith((SUFFIX, INDEX_SUFFIX)) for one in names):
        return "safetensors"
    raise CheckpointError(
        f"{path} is of no format that is read. It has neither *{SUFFIX} nor *{INDEX_SUFFIX} (safetensors), no "
        f"{torch_checkpoint.METADATA_NAME} (torch.distributed.checkpoint), and no {rank_files.METADATA_NAME} with "
        "rank_0.safetensors (the crate ferrotorch-distributed)",
        path=path,
    )
