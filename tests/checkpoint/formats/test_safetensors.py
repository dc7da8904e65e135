"""Plain safetensors: our files open with the safetensors library, and the library's with ours; bad ones are refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError, SaveFailed, StateError
from ferro_checkpoint.formats import open_foreign, write_safetensors

DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
DTYPES += ["float16", "float32", "float64", "complex64"]
WITH_ML_DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2"]
RNG = np.random.default_rng(0)


def example():
    """Return arrays of all dtypes and of odd shapes."""
    found = {name: RNG.integers(0, 2, (3, 5)).astype(name) for name in DTYPES}
    found |= {name: np.arange(7).astype(getattr(ml_dtypes, name)) for name in WITH_ML_DTYPES}
    return found | {
        "number": np.array(3, np.int64),
        "empty": np.empty((0, 4), np.float32),
        "none": np.empty((2, 0), bool),
        "transposed": np.arange(12.0).reshape(3, 4).T,
        "stepped": np.arange(12.0)[::-2],
        "ü/.b": np.ones(1),
    }


def same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def read_all(path):
    source = open_foreign(path)
    try:
        return {name: source.read(name) for name in source.tensors}
    finally:
        source.close()


def library(path):
    """Read with the library: bytes, dtype and shape, because it has no NumPy arrays of float8."""
    return dict(safetensors.deserialize(path.read_bytes()))


def without_float8(found):
    return {name: one for name, one in found.items() if not name.startswith("float8")}


def test_one_file(tmp_path):
    path, expected = tmp_path / "a.safetensors", example()
    write_safetensors(path, expected, {"title": "ü"})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    same(read_all(path), expected)
    found = library(path)
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (tuple(found[name]["shape"]), bytes(found[name]["data"])) == (array.shape, array.tobytes())
    write_safetensors(path, without_float8(expected), {"title": "ü"}, overwrite=True)
    same(safetensors.numpy.load_file(path), without_float8(expected))
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt", "title": "ü"}
    write_safetensors(path, expected, {"title": "ü"}, overwrite=True)
    same(read_all(path), expected)
    assert open_foreign(path).values == {"format": "pt", "title": "ü"}


def test_the_librarys_file_opens(tmp_path):
    expected = {name: np.ascontiguousarray(array) for name, array in example().items()}
    expected["number"] = np.array(3, np.int64)
    safetensors.numpy.save_file(expected, tmp_path / "a.safetensors", {"x": "y"})
    same(read_all(tmp_path / "a.safetensors"), expected)


def test_a_directory_of_several_files(tmp_path):
    path, expected = tmp_path / "d", example()
    write_safetensors(path, expected, file_bytes=64)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 4
    assert sorted([*names, "model.safetensors.index.json"]) == sorted(os.listdir(path))
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    same(read_all(path), expected)
    same(read_all(path / "model.safetensors.index.json"), expected)
    found = {}
    for name in names:
        part = library(path / name)
        assert all(index["weight_map"][tensor] == name for tensor in part)
        found |= part
    assert {name: bytes(one["data"]) for name, one in found.items()} == {n: a.tobytes() for n, a in expected.items()}
    (path / "consolidated.safetensors").write_bytes(b"of another program")
    same(read_all(path), expected)  # the index says which files count
    (path / "consolidated.safetensors").unlink()
    (path / "model.safetensors.index.json").unlink()
    same(read_all(path), expected)  # several files, no index


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.dictionaries(
        st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1),
        arrays.arrays(
            st.sampled_from(DTYPES[:-1]).map(np.dtype), arrays.array_shapes(min_dims=0, min_side=0, max_dims=4)
        ),
        max_size=5,
    ),
    file_bytes=st.integers(1, 500),
)
def test_whatever_is_written_is_read(tmp_path_factory, data, file_bytes):
    data.pop("__metadata__", None)
    directory = tmp_path_factory.mktemp("any")
    write_safetensors(directory / "d", data, file_bytes=file_bytes)
    same(read_all(directory / "d"), data)
    for file in (directory / "d").glob("*.safetensors"):
        found = safetensors.numpy.load_file(file)
        same(found, {name: data[name] for name in found})


def test_memory_stays_bounded(tmp_path):
    """Neither a contiguous array nor a transposed one is copied as a whole."""
    expected = {"rows": np.arange(6 << 20, dtype=np.float32), "columns": np.arange(6 << 20, dtype=np.float32)}
    expected["columns"] = expected["columns"].reshape(1024, -1).T
    out = {name: np.zeros_like(array) for name, array in expected.items()}
    out["columns"] = np.zeros((1024, 6 << 10), np.float32).T
    tracemalloc.start()
    try:
        write_safetensors(tmp_path / "a.safetensors", expected)
        source = open_foreign(tmp_path / "a.safetensors")
        for name in expected:
            source.read(name, out=out[name])
            assert (out[name] == expected[name]).all()
        assert tracemalloc.get_traced_memory()[1] < 20 << 20  # 6 MiB of them the comparison's
    finally:
        tracemalloc.stop()


def test_a_source_is_written(tmp_path):
    write_safetensors(tmp_path / "d", example(), file_bytes=64)
    source = open_foreign(tmp_path / "d")
    write_safetensors(tmp_path / "a.safetensors", source)
    same(read_all(tmp_path / "a.safetensors"), example() | {name: source.read(name) for name in source.tensors})


def test_nothing_is_replaced_unasked(tmp_path):
    write_safetensors(tmp_path / "d", {"a": np.ones(2)})
    with pytest.raises(StateError, match="overwrite=True"):
        write_safetensors(tmp_path / "d", {"a": np.zeros(2)})
    write_safetensors(tmp_path / "d", {"a": np.zeros(2), "b": np.ones(3)}, file_bytes=1, overwrite=True)
    assert sorted(read_all(tmp_path / "d")) == ["a", "b"]
    assert os.listdir(tmp_path) == ["d"]
    (tmp_path / "d" / "notes.txt").write_text("mine")
    with pytest.raises(StateError, match=r"notes.txt"):
        write_safetensors(tmp_path / "d", {"a": np.zeros(2)}, overwrite=True)
    (tmp_path / "e.safetensors").mkdir()
    with pytest.raises(StateError, match="is a directory"):
        write_safetensors(tmp_path / "e.safetensors", {}, overwrite=True)
    write_safetensors(tmp_path / "f.safetensors", {})
    write_safetensors(tmp_path / "f.safetensors", {"a": np.ones(1)}, overwrite=True)
    assert list(read_all(tmp_path / "f.safetensors")) == ["a"]


@pytest.mark.parametrize("call", ["pwritev", "fsync", "rename", "ftruncate"])
@pytest.mark.parametrize("name", ["a.safetensors", "d"])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, call, name):
    write_safetensors(tmp_path / name, {"a": np.arange(3)})
    real = getattr(os, call)
    for failing in range(20):
        calls = []

        def fail(*args, calls=calls, failing=failing, **kwargs):
            calls.append(args)
            if len(calls) == failing + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, fail)
        failed = pytest.raises(SaveFailed, match="No space left")
        with contextlib.suppress(pytest.fail.Exception), failed:
            write_safetensors(tmp_path / name, {"a": np.arange(4), "b": np.ones(2)}, file_bytes=1, overwrite=True)
        monkeypatch.setattr(os, call, real)
        if len(calls) <= failing:
            break
        assert os.listdir(tmp_path) == [name]
        assert len(read_all(tmp_path / name)["a"]) in (3, 4)
    assert failing > 0
    assert len(read_all(tmp_path / name)["a"]) == 4


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"": np.ones(1)}, None, "no name"),
        ({"a\0": np.ones(1)}, None, "no name"),
        ({"__metadata__": np.ones(1)}, None, "no name"),
        ({"\ud800": np.ones(1)}, None, "no text"),
        ({1: np.ones(1)}, None, "must be texts"),
        ({"a": np.ones(1, ">f4")}, None, "no checkpoint carries"),
        ({"a": np.ones(1, complex)}, None, "no checkpoint carries"),
        ({"a": np.array(["x"])}, None, "no checkpoint carries"),
        ({"a": np.ones(1)}, {"x": 1}, "are texts"),
    ],
)
def test_what_cannot_be_written(tmp_path, tensors, metadata, message):
    with pytest.raises(StateError, match=message):
        write_safetensors(tmp_path / "d", tensors, metadata)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def sharded(tmp_path):
    write_safetensors(tmp_path / "d", {"a": np.arange(3), "b": np.arange(4.0), "c": np.ones(5)}, file_bytes=60)
    return tmp_path / "d"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": "../d/model-00001-of-00002.safetensors"}, "no name of a .safetensors file in the same"),
        ({"a": "/etc/passwd"}, "no name of a"),
        ({"a": ".."}, "no name of a"),
        ({"a": "a\0.safetensors"}, "no name of a"),
        ({"a": "config.json"}, "no name of a"),
        ({"a": 1}, "no name of a"),
        ({"a": "missing.safetensors"}, "missing.safetensors: No such file"),
        ({"a": "model-00002-of-00002.safetensors"}, r"'a' is in model-00002.*does not have it"),
        ({"d": "model-00001-of-00002.safetensors"}, "'d' is in model-00001.*does not have it"),
        ({"a": None}, r"has tensor 'a', which is not in the index"),
    ],
)
def test_an_index_that_lies(sharded, change, message):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= change
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file is not None}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_foreign(sharded)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000, '{"weight_map": {}, "weight_map": {}}']
)
def test_an_index_that_is_none(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointDamaged):
        open_foreign(sharded)


def test_files_that_contradict_each_other(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    write_safetensors(sharded / "more.safetensors", {"a": np.arange(3)})
    with pytest.raises(CheckpointDamaged, match=r"'a': .*has it too"):
        open_foreign(sharded)


@pytest.mark.parametrize(
    ("infos", "message"),
    [
        ([[0], [1]], "overlap"),
        ([[0], [3]], "5 elements together"),
        ([[0], [2, 0]], "no position"),
        ([[0], [-2]], "no position"),
        ([[0], "x"], "no position"),
        ([[0], None], "no position|has it too"),
        ([[0], [1 << 61]], "elements together"),
        ([[1], [1]], "elements together"),
    ],
)
def test_chunks_that_lie(tmp_path, infos, message):
    sizes = [3, 1] if infos[1] == [1] and infos[0] == [0] else [2, 3]
    for i, (info, size) in enumerate(zip(infos, sizes, strict=True)):
        text = json.dumps({"w": {"saved_offsets": info}})
        write_safetensors(tmp_path / f"{i}.safetensors", {"w": np.ones(size)}, {"DCP_SHARDING_INFO": text})
    if message == "overlap":
        text = json.dumps({"w": {"saved_offsets": [4]}})
        write_safetensors(tmp_path / "2.safetensors", {"w": np.ones(1)}, {"DCP_SHARDING_INFO": text})
    with pytest.raises(CheckpointDamaged, match=message):
        open_foreign(tmp_path).read("w")


def test_a_file_that_changes_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.ones(1000)})
    source = open_foreign(path)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(CheckpointDamaged, match=r"ends at byte|was changed"):
        source.read("a")


def test_many_files_need_few_descriptors(tmp_path):
    write_safetensors(tmp_path / "d", {f"t{i}": np.full(2, i) for i in range(150)}, file_bytes=16)
    before = len(os.listdir("/proc/self/fd"))
    source = open_foreign(tmp_path / "d")
    assert all((source.read(f"t{i}") == i).all() for i in range(150))
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    for file in (tmp_path / "d").glob("*-of-00150.safetensors"):
        os.utime(file, (1, 1))
    for i in (0, 149):  # one that is open, and one that opens again
        with pytest.raises(CheckpointDamaged, match="was changed"):
            source.read(f"t{i}")
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_every_byte_of_a_header(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.arange(3), "b": np.ones((2, 2), np.float32)}, path)
    content = bytearray(path.read_bytes())
    for at in range(len(content) - 40):
        for flip in (0xFF, 1):
            content[at] ^= flip
            path.write_bytes(content)
            try:
                read_all(path)
            except CheckpointDamaged:
                pass
            finally:
                content[at] ^= flip


def test_what_is_of_no_format(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither \*.safetensors nor .*\.metadata .*metadata.json with rank_0"):
        open_foreign(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_foreign(tmp_path / "no")
    with pytest.raises(StateError, match="give one of safetensors, torch, ferrotorch"):
        open_foreign(tmp_path, "pickle")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="format='safetensors' in Python"):
        open_foreign(tmp_path / "x.bin")
    os.mkfifo(tmp_path / "p.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        open_foreign(tmp_path / "p.safetensors")
    (tmp_path / "ferro.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"ferro_checkpoint.load"):
        open_foreign(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="give the path of the one"):
        open_foreign(tmp_path, "safetensors")
