"""The crate's files: pieces are put together by their real sizes, and nothing is dropped."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.formats import open_foreign

ROWS = np.arange(35, dtype=np.float32).reshape(7, 5)
COLUMNS = np.arange(24, dtype=np.float64).reshape(2, 3, 4)


def specs():
    return {
        "rows": {"full_shape": [7, 5], "shard_dim": 0, "shard_sizes": [3, 2, 2]},
        "columns": {"full_shape": [2, 3, 4], "shard_dim": 2, "shard_sizes": [1, 1, 1]},  # wrong, and nobody minds
    }


def write(directory, ranks=None, **metadata):
    """Write three ranks' files as the crate does."""
    pieces = {"rows": np.split(ROWS, [3, 5]), "columns": np.split(COLUMNS, [2, 4], 2)}
    for rank in range(3):
        tensors = {name: np.ascontiguousarray(of_ranks[rank]) for name, of_ranks in pieces.items()}
        tensors |= {"whole": np.ones(3, np.float32), "own": np.full(2, rank, np.float32), "number": np.array(4.0)}
        if rank == 1:
            tensors["alone"] = np.arange(4, dtype=np.float32)
        tensors |= (ranks or {}).get(rank, {})
        tensors = {name: array for name, array in tensors.items() if array is not None}
        safetensors.numpy.save_file(tensors, directory / f"rank_{rank}.safetensors")
    content = {"num_ranks": 3, "tensor_specs": specs()} | metadata
    (directory / "metadata.json").write_text(json.dumps(content, indent=2))


def test_all_tensors_are_there(tmp_path):
    write(tmp_path)
    source = open_foreign(tmp_path)
    expected = {"rows": ROWS, "columns": COLUMNS, "whole": np.ones(3, np.float32), "number": np.array(4.0)}
    expected["alone"] = np.arange(4, dtype=np.float32)
    expected |= {f"own@rank_{rank}": np.full(2, rank, np.float32) for rank in range(3)}
    assert set(source.tensors) == set(expected)
    for name, array in expected.items():
        read = source.read(name)
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())
    source.close()


def spec(**changes):
    return {"tensor_specs": {"rows": {"full_shape": [7, 5], "shard_dim": 0} | changes}}


@pytest.mark.parametrize(
    ("ranks", "metadata", "message"),
    [
        ({1: {"rows": np.ones((3, 5), np.float32)}}, {}, "'rows': its pieces have 8 along dim 0"),
        ({1: {"rows": np.ones((2, 4), np.float32)}}, {}, r"'rows': rank_1.* has shape \(2, 4\), no piece"),
        ({1: {"rows": np.ones(2, np.float32)}}, {}, r"rank_1.* has shape \(2,\), no piece"),
        ({2: {"rows": np.ones((2, 5))}}, {}, "'rows': rank_2.* has F64, and rank_0.* has F32"),
        ({2: {"rows": None}}, {}, "'rows': rank_2.safetensors has no piece"),
        ({rank: {"rows": None} for rank in range(3)}, {}, "'rows': .*no file has it"),
        ({1: {"own@rank_0": np.ones(1)}}, {}, "'own': it differs between ranks"),
        ({}, {"num_ranks": 2}, "rank_2.safetensors is there: files of two checkpoints"),
        ({}, {"num_ranks": 4}, "rank_3.safetensors: No such file"),
        ({}, {"num_ranks": True}, "no num_ranks"),
        ({}, {"num_ranks": 1 << 60}, "no num_ranks"),
        ({}, {"tensor_specs": []}, "no tensor_specs"),
        ({}, spec(shard_dim=2), "'rows': .*shard_dim"),
        ({}, spec(full_shape=[7, -5]), "'rows': .*full_shape"),
        ({}, spec(full_shape=None), "'rows': .*full_shape"),
        ({}, {"tensor_specs": {"rows": 1}}, "'rows': .*full_shape"),
    ],
)
def test_files_that_do_not_fit_each_other(tmp_path, ranks, metadata, message):
    write(tmp_path, ranks, **metadata)
    with pytest.raises(CheckpointError, match=message):
        open_foreign(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"num_ranks": 1e400}', '{"num_ranks": 3, "num_ranks": 3}'])
def test_metadata_that_are_none(tmp_path, text):
    write(tmp_path)
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(CheckpointDamaged):
        open_foreign(tmp_path)
