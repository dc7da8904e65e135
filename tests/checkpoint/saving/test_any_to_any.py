"""A state that any number of ranks holds in any way is saved as whole tensors, and loaded by any others in any way."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors

import ferro
import ferro_checkpoint
from ferro_checkpoint.loading import segment_reader
from ferro_checkpoint.plan import segments
from ferro_checkpoint.saving import exchange, save_plan
from ferro_testing import run_ranks

from ..placements import Holder, bits, expected, held, random_arrays


def on_ranks(world_size, function):
    """Run a function on simulated ranks; on one rank without a group."""
    if world_size == 1:
        function(None)
    else:
        ferro.simulate(function, world_size, timeout_s=30, run_timeout_s=60)


def rank_of(group):
    return 0 if group is None else group.rank


def check_files(directory: str, arrays) -> None:
    """Compare what the safetensors library reads, and a load without a state, with the whole arrays."""
    loaded = ferro_checkpoint.load(directory)["a"]
    files = sorted(Path(directory).glob("a*.safetensors"))
    found = [tensor for file in files for tensor in safetensors.deserialize(file.read_bytes())]
    assert len(found) == len(arrays)
    assert {name for name, _ in found} == loaded.keys() == arrays.keys()
    for name, stored in found:
        array = arrays[name]
        assert bytes(stored["data"]) == bits(array) == bits(loaded[name])
        assert (loaded[name].shape, loaded[name].dtype) == (array.shape, array.dtype)
        assert stored["shape"] == [*array.shape, *([2] if array.dtype == np.complex128 else [])]


def save_held(directory: str, seed: int, arrays, group, world_size: int) -> None:
    pieces = held(seed, arrays, world_size, fill=True)[rank_of(group)]
    state = {"a": Holder(pieces), "seed": seed, "own": {"of": [rank_of(group)]}}
    ferro_checkpoint.save(directory, state, group, overwrite=True, timeout_s=30)


def load_held(directory: str, seed: int, own_seed: int, arrays, group, world_size: int) -> None:
    rank = rank_of(group)
    pieces = held(own_seed, arrays, world_size, fill=False)[rank]
    state = {"a": Holder(pieces), "seed": 0, "own": {"of": [None]}}
    ferro_checkpoint.load(directory, state, group, timeout_s=30)
    wanted = expected(own_seed, arrays, world_size)[rank]
    assert state["seed"] == seed
    assert pieces.keys() == wanted.keys()
    for name, own in pieces.items():
        for piece, want in zip(own, wanted[name], strict=True):
            assert bits(piece.data) == bits(want.data), name


@pytest.fixture
def short_segments(monkeypatch):
    """Cut small arrays into many files and segments, and move them in many rounds."""
    monkeypatch.setattr(save_plan, "FILE_BYTES", 30_000)
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 8192)
    monkeypatch.setattr(segments, "EXCHANGED_BYTES", 4096)
    monkeypatch.setattr(segments, "LEAST_OWN_BYTES", 512)
    for module in (exchange, segment_reader):
        monkeypatch.setattr(module, "ROUND_BYTES", 8192)
        monkeypatch.setattr(module, "_LEAST_ROUND_BYTES", 8192)


def test_random_placements(tmp_path):
    check_seeds(tmp_path, range(15))


def test_random_placements_in_many_segments(tmp_path, short_segments):
    check_seeds(tmp_path, range(30, 45))


def check_seeds(tmp_path, seeds):
    """Save arrays as random ranks hold them, and load them as others do."""
    for seed in seeds:
        rng = random.Random(seed)
        n, m = rng.randint(1, 6), rng.randint(1, 6)
        arrays = random_arrays(seed)
        directory = str(tmp_path / "c")
        try:
            on_ranks(n, lambda group: save_held(directory, seed, arrays, group, n))  # noqa: B023
            check_files(directory, arrays)
            on_ranks(m, lambda group: load_held(directory, seed, seed + 1, arrays, group, m))  # noqa: B023
        except BaseException as error:
            error.add_note(f"seed {seed}, from {n} to {m} ranks")
            raise
        shutil.rmtree(directory)


def save_and_load_by_all(group, path: str, seed: int) -> None:
    """Save by the first 1, 2, … ranks of the group, and load each of these checkpoints by the first 1, 2, … ranks."""
    arrays = random_arrays(seed)
    groups = [group.split(0 if group.rank < n else None) for n in range(1, group.world_size + 1)]
    for n, own in enumerate(groups, 1):
        if own is not None:
            save_held(f"{path}/{n}", seed, arrays, own, n)
    group.barrier()
    for n in range(1, group.world_size + 1):
        for m, own in enumerate(groups, 1):
            if own is not None:
                load_held(f"{path}/{n}", seed, n, arrays, own, m)


def test_any_number_of_processes_to_any_other(tmp_path):
    run_ranks(save_and_load_by_all, 6, backend="gloo", args=[str(tmp_path), 110], timeout_s=90)
    for n in range(1, 7):
        check_files(str(tmp_path / str(n)), random_arrays(110))
