"""Checkpoints of torch.distributed.checkpoint are read as torch wrote them, and damaged ones are refused."""

from __future__ import annotations

import shutil
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError, StateError
from ferro_checkpoint.formats import open_foreign
from ferro_checkpoint.formats.input_file import InputFile
from ferro_checkpoint.formats.torch_archive import TorchArchive

METADATA = ".metadata"


def elements(shape, dtype):
    return (np.arange(np.prod(shape, dtype=int)) % 97).reshape(shape).astype(dtype)


def same(read, expected):
    assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
    assert read.tobytes() == expected.tobytes()


def test_dtypes_and_strides_and_values(torch_files):
    source = open_foreign(torch_files / "nested")
    for name in source.tensors:
        if name.startswith("dtypes."):
            kind = name.removeprefix("dtypes.")
            same(source.read(name), elements((3,), getattr(ml_dtypes, kind, kind)))
    assert sum(name.startswith("dtypes.") for name in source.tensors) == 17
    same(source.read("model.transposed"), elements((3, 4), np.float32).T.copy())
    same(source.read("model.part"), elements((4, 6), np.float32)[1:3, 2:5].copy())
    same(source.read("model.number"), elements((), np.int64))
    same(source.read("model.empty"), elements((0, 3), np.float32))
    same(source.read("model.parameter"), elements((5,), np.float32))
    assert source.tensors["dtypes.complex128"] == ("complex128", (3,))
    assert source.values == {
        "values.lr": 0.1,
        "values.betas": [0.9, 0.99],
        "values.big": 1 << 70,
        "values.text": "ü",
        "values.none": None,
        "values.flags.0": True,
        "values.flags.1.a.1": -2,
        "values.size": [2, 3],
    }
    assert set(source.unreadable) == {"values.time", "values.device"}
    assert "datetime.timedelta" in source.unreadable["values.time"]
    assert source.paths["values.flags.1.a.1"] == ("values", "flags", 1, "a", "1")
    with pytest.raises(StateError, match=r"no tensor 'values.time'.*timedelta"):
        source.read("values.time")
    source.close()


WHOLE = elements((7, 6), np.float32)
SHARDED = {
    **dict.fromkeys(("rows", "columns", "both", "hybrid", "replicated", "plain"), WHOLE),
    "few": elements((2, 3), np.float32),
    "older": elements((9, 2), np.float32),
}


def test_tensors_of_several_ranks_are_whole(torch_files):
    source = open_foreign(torch_files / "sharded", "torch")
    assert dict(source.tensors) == {name: ("F32", array.shape) for name, array in SHARDED.items()}
    assert source.values == {"step": 7}
    for name, expected in SHARDED.items():
        same(source.read(name), expected)
        backwards = np.zeros(expected.shape[::-1], np.float32).T  # filled where it lies, whatever its strides
        assert source.read(name, out=backwards) is backwards
        assert (backwards == expected).all()
    with pytest.raises(StateError, match=r"float32 \(7, 6\), and the array for it is float64"):
        source.read("rows", out=np.zeros((7, 6)))


def test_files_without_crc32_and_of_one_rank(torch_files):
    source = open_foreign(torch_files / "no-crc32")
    same(source.read("w"), elements((3,), np.float32))
    assert source.values == {"n": 1}
    with pytest.raises(CheckpointError, match=r"every rank saved for itself.*__0.metadata"):
        open_foreign(torch_files / "alone")
    same(open_foreign(torch_files / "alone" / "__0.metadata").read("w"), elements((3,), np.float32))


def test_the_hugging_face_writer(torch_files):
    source = open_foreign(torch_files / "hugging-face")
    for i, name in enumerate("abc"):
        same(source.read(name), elements((3, 2), np.float32) + np.float32(i))
    chunks = open_foreign(torch_files / "hugging-face-chunks")
    assert set(chunks.tensors) == {"rows", "both", "plain"}
    for name in chunks.tensors:
        same(chunks.read(name), WHOLE)


@pytest.fixture
def copy(torch_files, tmp_path):
    return shutil.copytree(torch_files / "sharded", tmp_path / "copy")


def test_a_changed_byte_is_found_or_harmless(torch_files, tmp_path):
    """Every byte of a chunk's archive: the pickle, the directory and the data."""
    copy = shutil.copytree(torch_files / "alone", tmp_path / "copy")
    file = copy / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    expected, found = elements((3,), np.float32), 0
    for at in range(0, len(content), 3):  # 3 is prime to the sizes of all parts
        content[at] ^= 0xFF
        file.write_bytes(content)
        source = open_foreign(copy / "__0.metadata")
        try:
            same(source.read("w"), expected)  # padding, dates and names that nobody reads
        except CheckpointError as error:
            assert error.tensor == "w"  # noqa: PT017 (many of these changes are harmless)
            found += 1
        finally:
            source.close()
            content[at] ^= 0xFF
    assert found > 130


def test_files_that_are_missing_short_or_elsewhere(copy):
    metadata = (copy / METADATA).read_bytes()
    (copy / METADATA).write_bytes(metadata.replace(b"__3_0.distcp", b"../evil/data"))
    with pytest.raises(CheckpointDamaged, match="no name of a file in the same directory"):
        open_foreign(copy)
    (copy / METADATA).write_bytes(metadata)
    content = (copy / "__3_0.distcp").read_bytes()
    (copy / "__3_0.distcp").write_bytes(content[:-1])
    with pytest.raises(CheckpointDamaged, match=r"of __3_0.distcp, which has 11038"):
        open_foreign(copy)
    (copy / "__3_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__3_0.distcp: No such file"):
        open_foreign(copy)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"torch\x94\x8c\x07float32", b"torch\x94\x8c\x07Tensorx", "not on the list"),
        (b"\x8c\x05torch\x94\x8c\x04Size", b"\x8c\x02os\x94\x8c\x06system", "holds 'os.system'"),
        (b"K\x07K\x06\x86", b"K\x08K\x06\x86", "42 elements together, and its shape"),
        (b"__1_0.distcp", b"/etc/passwd\0", "no name of a file"),
    ],
)
def test_metadata_that_lie(copy, old, new, message):
    content = (copy / METADATA).read_bytes()
    assert old in content
    content = content.replace(old, new)
    content = content[:3] + struct.pack("<Q", len(content) - 11) + content[11:]
    (copy / METADATA).write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=message):
        open_foreign(copy)


def archive(path, change=lambda pickled: pickled, byte_order="<", **records):
    """Write an archive of a tensor (4, 3), transposed, as torch.save does, and open it."""
    pickled = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
        b"X\x01\0\0\x000X\x03\0\0\0cpuK\x0ctQK\0K\x04K\x03\x86K\x01K\x04\x86\x89ccollections\nOrderedDict\n)RtR."
    )
    storage = elements((12,), f"{byte_order}f4").tobytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if records.pop("packed", False) else 0) as file:
        for name, content in {"data.pkl": change(pickled), "data/0": storage, **records}.items():
            file.writestr(f"x/{name}", content)
    opened = InputFile(str(path))
    return TorchArchive(opened, 0, opened.nbytes)


def test_an_archive_of_another_byte_order(tmp_path):
    target = np.zeros((4, 3), np.float32)
    archive(tmp_path / "a", byte_order=">", byteorder=b"big").read_tensor(target, "F32")
    same(target, elements((3, 4), np.float32).T.copy())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\0K\x04K\x03", b"K\x01K\x04K\x03", "does not fit a storage of 48"),
        (b"K\x01K\x04\x86", b"K\x01K\0\x86", "with holes or overlaps"),
        (b"K\x01K\x04\x86", b"K\x01K\x01\x86", "with holes or overlaps"),
        (b"K\x01K\x04\x86", b"K\x01K\x05\x86", "with holes or overlaps"),
        (b"K\x04K\x03", b"K\x03K\x04", "another shape than"),
        (b"FloatStorage", b"DoubleStorage", "its tensor is F64, and F32"),
        (b"FloatStorage", b"UntypedStorage", "no dtype"),
        (b"ctorch\nFloatStorage", b"cposix\nsystem", "posix.system"),
        (b"\0\0\x000X", b"\0\0\x001X", "no 'x/data/1'"),
        (b"_rebuild_tensor_v2", b"_rebuild_parameter", "no tensor"),
        (b"tQ", b"t", "no storage"),
        (b"R.", b"R", "no pickle"),
    ],
)
def test_archives_that_lie(tmp_path, old, new, message):
    opened = archive(tmp_path / "a", lambda pickled: pickled.replace(old, new))
    target = np.zeros((4, 3), np.float32)
    with pytest.raises(CheckpointDamaged, match=message):
        opened.read_tensor(target, "F32")


def test_an_archive_that_is_compressed(tmp_path):
    with pytest.raises(CheckpointDamaged, match="compressed"):
        archive(tmp_path / "a", packed=True)


def test_an_archive_is_never_larger_than_its_range(torch_files):
    source = open_foreign(torch_files / "alone" / "__0.metadata")
    file = source._files.open("__0_0.distcp")
    for end in (0, 21, 22, 41, 42, 100, file.nbytes - 1):
        with pytest.raises(CheckpointDamaged):
            TorchArchive(file, 0, end)
