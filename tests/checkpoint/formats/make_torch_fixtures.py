"""Make torch_fixtures.tar.xz with torch's own writers.

The project's test environment has no torch, so this runs by hand, in an environment of its own:

    python -m venv VENV && VENV/bin/pip install torch==2.13.0 numpy safetensors
    VENV/bin/python tests/checkpoint/formats/make_torch_fixtures.py

It writes the archive beside itself; test_torch.py knows what must be in it by `elements`.
"""

from __future__ import annotations

import datetime
import io
import pathlib
import tarfile
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

RANKS = 4
TIME = datetime.timedelta(seconds=60)


def elements(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Count up from 0 and begin anew after 96; test_torch.py does the same with NumPy."""
    counted = torch.arange(torch.Size(shape).numel()) % 97
    return counted.reshape(shape).to(dtype)


def nested_state() -> dict:
    """Give a state of one process: all dtypes, strides, values that are JSON and values that are not."""
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
    dtypes += [torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
    dtypes += [torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2]
    return {
        "dtypes": {str(dtype).removeprefix("torch."): elements((3,), dtype) for dtype in dtypes},
        "model": {
            "transposed": elements((3, 4), torch.float32).t(),
            "part": elements((4, 6), torch.float32)[1:3, 2:5],
            "number": elements((), torch.int64),
            "empty": elements((0, 3), torch.float32),
            "parameter": torch.nn.Parameter(elements((5,), torch.float32)),
        },
        "values": {
            "lr": 0.1,
            "betas": (0.9, 0.99),
            "big": 1 << 70,
            "text": "ü",
            "none": None,
            "flags": [True, {"a": {1: -2}}],
            "time": TIME,
            "size": torch.Size([2, 3]),
            "device": torch.device("cpu"),
        },
    }


def sharded_state(rank: int) -> dict:
    """Give a state of four ranks: one and two mesh axes, uneven, replicated, and torch's older ShardedTensor."""
    line = init_device_mesh("cpu", (RANKS,))
    square = init_device_mesh("cpu", (2, 2))
    whole = elements((7, 6), torch.float32)
    older = sharded_tensor.empty(ChunkShardingSpec(dim=0, placements=[f"rank:{r}/cpu" for r in range(RANKS)]), 9, 2)
    for shard in older.local_shards():
        begin, count = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
        shard.tensor.copy_(elements((9, 2), torch.float32)[begin : begin + count])
    few = distribute_tensor(elements((2, 3), torch.float32), line, [Shard(0)])  # two ranks have nothing of it
    assert isinstance(few, DTensor)
    return {
        "rows": distribute_tensor(whole, line, [Shard(0)]),
        "columns": distribute_tensor(whole, line, [Shard(1)]),
        "both": distribute_tensor(whole, square, [Shard(0), Shard(1)]),
        "hybrid": distribute_tensor(whole, square, [Replicate(), Shard(1)]),
        "replicated": distribute_tensor(whole, line, [Replicate()]),
        "few": few,
        "older": older,
        "plain": whole.clone(),
        "step": 7,
    }


def _rank(rank: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=RANKS, timeout=TIME)
    state = sharded_state(rank)
    dcp.save(state, checkpoint_id=f"{out}/sharded")
    tensors = {name: state[name] for name in ("rows", "both", "plain")}
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(f"{out}/hugging-face-chunks", save_distributed=True))
    dist.destroy_process_group()


def main() -> None:
    """Write the archive."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as out:
        dcp.save(nested_state(), checkpoint_id=f"{out}/nested")
        plain = {name: elements((3, 2), torch.float32) + i for i, name in enumerate("abc")}
        index = {"a": 1, "b": 2, "c": 1}
        dcp.save(plain, storage_writer=HuggingFaceStorageWriter(f"{out}/hugging-face", fqn_to_index_mapping=index))
        dcp.save({"w": elements((3,), torch.float32)}, checkpoint_id=f"{out}/alone", use_collectives=False)
        torch.serialization.set_crc32_options(False)
        dcp.save({"w": elements((3,), torch.float32), "n": 1}, checkpoint_id=f"{out}/no-crc32")
        torch.serialization.set_crc32_options(True)
        torch.multiprocessing.spawn(_rank, (out,), RANKS)
        target = pathlib.Path(__file__).with_name("torch_fixtures.tar.xz")
        with tarfile.open(target, "w:xz", preset=9) as archive:
            for path in sorted(pathlib.Path(out).rglob("*")):
                if path.is_file() and path.name != "store":
                    info = tarfile.TarInfo(str(path.relative_to(out)))
                    content = path.read_bytes()
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                    print(info.name, info.size)
        print(target.stat().st_size)


if __name__ == "__main__":
    main()
