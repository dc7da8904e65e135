"""The states that the checkpoint benchmarks save: the same float32 parameters for ferro and for torch.

A state has layers of a weight and a bias, 16 MiB each. The ranks hold them in one of three layouts:

    shards       a flat part of each layer, as FSDP has it; for torch, DTensors of rows, as its FSDP has them
    columns      columns of each weight, and of each bias a part, as tensor parallelism has them; DTensors for torch
    replicated   every rank has everything, as under DDP
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

LAYER_BYTES = 16 << 20
_ROWS = 2048
_WEIGHT, _BIAS = (_ROWS, LAYER_BYTES // 4 // _ROWS - 1), (_ROWS,)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Piece:
    """What ferro's strategies tell of an array that is spread over ranks; see `ferro_checkpoint.ArrayPiece`."""

    shape: tuple[int, ...]
    data: Floats
    start: tuple[int, ...]
    extent: tuple[int, ...]
    flat: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """The parameters of one rank, as a module of ferro's strategies offers them."""

    pieces: Mapping[str, Piece]

    def checkpoint_arrays(self) -> Mapping[str, Piece]:
        """Return the pieces by the names of the parameters."""
        return self.pieces

    @property
    def nbytes(self) -> int:
        """The bytes that this rank holds."""
        return sum(piece.data.nbytes for piece in self.pieces.values())


def ferro_model(layout: str, layers: int, rank: int, world_size: int) -> Model:
    """Return this rank's part of the model, filled with numbers of its own."""
    pieces: dict[str, Piece] = {}
    for layer in range(layers):
        held = _layer(layout, layer, rank, world_size)
        pieces |= {f"{layer}.{name}": piece for name, piece in held.items()}
    return Model(pieces)


def _layer(layout: str, layer: int, rank: int, world_size: int) -> dict[str, Piece]:
    weights = int(np.prod(_WEIGHT))
    if layout == "shards":
        low, high = _part(weights + _ROWS, rank, world_size)
        data = _random(high - low, layer, rank)
        weight, cut = min(high, weights) - min(low, weights), min(low, weights)
        bias = max(low, weights) - weights, max(0, high - max(low, weights))
        return {
            "weight": Piece(_WEIGHT, data[:weight], (0, 0), _WEIGHT, (cut, weight)),
            "bias": Piece(_BIAS, data[weight:], (0,), _BIAS, bias),
        }
    low, high = (0, _WEIGHT[1]) if layout == "replicated" else _part(_WEIGHT[1], rank, world_size)
    first, last = (0, _ROWS) if layout == "replicated" else _part(_ROWS, rank, world_size)
    seed = 0 if layout == "replicated" else rank
    weight_data = _random(_ROWS * (high - low), layer, seed).reshape(_ROWS, high - low)
    return {
        "weight": Piece(_WEIGHT, weight_data, (0, low), weight_data.shape),
        "bias": Piece(_BIAS, _random(last - first, layer, seed), (first,), (last - first,)),
    }


def torch_state(layout: str, layers: int, rank: int, world_size: int) -> dict[str, object]:
    """Return the same parameters for torch, whose process group must be open."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    def filled(shape: Sequence[int], layer: int, seed: int) -> torch.Tensor:
        return torch.from_numpy(_random(int(np.prod(shape)), layer, seed).reshape(shape))

    state: dict[str, object] = {}
    mesh = None if layout == "replicated" else init_device_mesh("cpu", (world_size,))
    for layer in range(layers):
        for name, shape in (("weight", _WEIGHT), ("bias", _BIAS)):
            if mesh is None:
                state[f"{layer}.{name}"] = filled(shape, layer, 0)
                continue
            dim = 1 if layout == "columns" and len(shape) == 2 else 0
            share = -(-shape[dim] // world_size)  # torch gives the last ranks less
            size = max(0, min(share, shape[dim] - rank * share))
            local = filled((*shape[:dim], size, *shape[dim + 1 :]), layer, rank)
            stride = (shape[1], 1) if len(shape) == 2 else (1,)
            state[f"{layer}.{name}"] = DTensor.from_local(
                local, mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=stride
            )
    return state


def open_torch() -> None:
    """Open torch's process group over gloo, with one thread for arithmetic."""
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")


def close_torch() -> None:
    """Close it."""
    import torch.distributed

    torch.distributed.destroy_process_group()


def directory_bytes(path: Path) -> int:
    """Return the bytes of all files in a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove(path: Path) -> None:
    """Remove a file or a checkpoint, and wait until that is on disk, so that what follows has nothing of it to do."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until the entries of a directory are on disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def drop_from_cache(path: Path) -> None:
    """Take the files, which are on disk, out of the page cache."""
    for file in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


class ExtraMemory:
    """The memory that this process has at most beyond what it has at the beginning: pages in memory, also shared."""

    def __init__(self) -> None:
        """Give freed memory back to the system, and begin."""
        library = ctypes.CDLL(ctypes.util.find_library("c"))
        library.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        self._before = _status("VmRSS")

    def peak(self) -> int:
        """Return the bytes."""
        return max(0, _status("VmHWM") - self._before)


def bytes_read(kind: str = "rchar") -> int:
    """Return the bytes that this process has read: by calls ("rchar"), or from a disk ("read_bytes")."""
    return int(re.search(rf"^{kind}: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)[1])


def _status(name: str) -> int:
    return int(re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) << 10


def _part(count: int, rank: int, world_size: int) -> tuple[int, int]:
    share = -(-count // world_size)
    return min(count, rank * share), min(count, (rank + 1) * share)


def _random(count: int, layer: int, seed: int) -> Floats:
    return np.random.default_rng((layer, seed)).standard_normal(count, np.float32)
