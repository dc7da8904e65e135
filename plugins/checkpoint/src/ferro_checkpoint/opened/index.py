"""The index of a bundle of several files: it must say what the files' headers say."""

from __future__ import annotations

from collections.abc import Mapping

from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.layout.json_text import UnreadableJson, read_json, shown


def decode_index(text: bytes, path: str) -> dict[str, str]:
    """Read an index; return the file's name of each tensor.

    Raises:
        CheckpointDamaged: it is no index.
    """
    try:
        content = read_json(text)
    except UnreadableJson as error:
        raise CheckpointDamaged(f"{path}: the index is no JSON: {error}", path=path) from error
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or set(map(type, where.values())) - {str}:
        raise CheckpointDamaged(f"{path}: this is no index of tensors: it has no weight_map", path=path)
    return where


def check_index(text: bytes, tensors: Mapping[str, str], path: str) -> None:
    """Compare an index with the files that tensors were found in.

    Raises:
        CheckpointDamaged: they differ, or it is no index; the message names the tensor.
    """
    where = decode_index(text, path)
    if where == tensors:
        return
    name = next(name for name in sorted({*where, *tensors}) if where.get(name) != tensors.get(name))
    told, found = (f"in {shown(one[name])}" if name in one else "in no file" for one in (where, tensors))
    text_ = f"{path}: the index says that tensor {shown(name)} is {told}, and it is {found}: load an older checkpoint"
    raise CheckpointDamaged(text_, path=path, tensor=name)
