"""Pickles are read without executing anything; what is not on the list, or no pickle, is one error."""

from __future__ import annotations

import pickle
import pickletools
import shutil
import struct
import time
from collections import OrderedDict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferro_checkpoint.errors import CheckpointDamaged, CheckpointError
from ferro_checkpoint.formats import open_foreign
from ferro_checkpoint.formats.pickle_names import Built, Maker, built_by
from ferro_checkpoint.formats.pickle_reader import RefusedPickle, read_pickle
from ferro_checkpoint.formats.torch_metadata import decode_metadata
from ferro_checkpoint.formats.torch_names import ARCHIVE_NAMES, METADATA_NAMES

KEYS = st.integers(-(1 << 63), (1 << 63) - 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | KEYS, inner),
    max_leaves=20,
)


@given(value=PLAIN, protocol=st.integers(2, 5))
@settings(max_examples=50, deadline=None)
def test_plain_values_come_back(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol), {}, "p") == value


def test_long_values_come_back():
    value = {"text": "x" * 70_000, "bytes": b"y" * 70_000, "many": list(range(70_000)), "ordered": OrderedDict(a=1)}
    assert read_pickle(pickle.dumps(value), ARCHIVE_NAMES, "p") == value


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("echo executed >&2; exit 1",)


class WithState:
    def __init__(self):
        self.x = 1


@pytest.mark.parametrize("names", [METADATA_NAMES, ARCHIVE_NAMES])
@pytest.mark.parametrize(
    "value",
    [
        Evil(),
        {"a": [Evil()]},
        WithState(),
        print,
        eval,
        __import__,
        {1},
        frozenset((1,)),
        bytearray(b"a"),
        int,
        1 << 9000,
    ],
    ids=range(11),
)
def test_all_else_is_refused(value, names, capfd):
    with pytest.raises(RefusedPickle, match=r"p: at byte \d+"):
        read_pickle(pickle.dumps(value), names, "p")
    assert "executed" not in capfd.readouterr().err


SIZE = b"ctorch\nSize\n"
HOSTILE = {
    "nothing": b"",
    "no end": b"K\x01",
    "two values": b"K\x01K\x02.",
    "a mark at the end": b"(.",
    "a mark as a value": b"(a.",
    "a mark as a key": b"}(K\x01s.",
    "no mark": b"K\x01K\x02t.",
    "an empty stack": b"R.",
    "a long integer": b"\x8b\xff\xff\xff\x7f\x01.",
    "a negative length": b"\x8b\xff\xff\xff\xff\x01.",
    "a long text": b"\x8d" + b"\xff" * 8 + b"a.",
    "long bytes": b"\x8e" + struct.pack("<Q", 1 << 40) + b"a.",
    "a long frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "a newer protocol": b"\x80\x06N.",
    "no such memo": b"j\xff\xff\xff\xffN.",
    "a call of a constant": b"ctorch\nfloat32\n)R.",
    "a call of a text": b"X\1\0\0\0a)R.",
    "a call without a tuple": SIZE + b"K\1R.",
    "a state of a class": SIZE + b"}b.",
    "a state of a size": SIZE + b"K\1\x85\x85R}b.",
    "a state of a dtype": b"ctorch\nfloat32\n}b.",
    "a state of a list": b"]}b.",
    "a state twice": b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}b}b.",
    "a list as a key": b"}]K\1s.",
    "a nested tuple as a key": b"}" + b")" + b"\x85" * 100_000 + b"K\1s.",
    "a long tuple as a key": b"}(" + b"N" * 65 + b"tK\1s.",
    "an odd dict": b"}(K\1u.",
    "items of no dict": b"](K\1K\2u.",
    "a negative size": SIZE + b"J\xff\xff\xff\xff\x85\x85R.",
    "a size of texts": SIZE + b"X\1\0\0\0a\x85\x85R.",
    "a size of many": SIZE + b"(" + b"K\1" * 65 + b"t\x85R.",
    "a name of no text": b"K\1K\2\x93.",
    "getattr of a size": b"cbuiltins\ngetattr\n" + SIZE + b"X\7\0\0\0__new__\x86R.",
    "getattr of a text": b"cbuiltins\ngetattr\nX\1\0\0\0aX\4\0\0\0join\x86R.",
    "a dotted name": b"ctorch\nSize.__class__\n.",
    "a name without an end": b"c" + b"a" * 5000,
    "an old instance": b"(ios\nsystem\n.",
    "an extension": b"\x82\x01.",
    "an outer reference": b"K\1Q.",
    "a surrogate": b"X\3\0\0\0\xed\xa0\x80.",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_are_refused(data):
    begin = time.process_time()
    with pytest.raises(RefusedPickle):
        read_pickle(data, METADATA_NAMES, "p")
    assert time.process_time() - begin < 5


def test_depth_and_memo_cost_no_more_than_their_length():
    deep = read_pickle(b"]" * 100_000 + b"a" * 99_999 + b".", {}, "p")
    assert len(deep) == 1
    assert read_pickle(b"Nr\xff\xff\xff\xff.", {}, "p") is None  # Python's own reader makes a memo of 32 GiB here
    itself = read_pickle(b"]q\0h\0a.", {}, "p")
    assert itself[0] is itself


def test_instances_are_stand_ins():
    names = {("a", "B"): built_by("B"), ("a", "twice"): Maker(lambda args: args * 2)}
    read = read_pickle(b"\x80\x02ca\nB\nK\1\x85\x81}X\1\0\0\0xK\2sb.", names, "p")
    assert (type(read), read.kind, read.args, read.state) == (Built, "B", (1,), {"x": 2})
    assert read_pickle(b"ca\ntwice\nK\1\x85R.", names, "p") == (1, 1)


def test_a_member_of_an_enum_by_name():
    module = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    by_name = read_pickle(b"cbuiltins\ngetattr\n" + module + b"X\1\0\0\0a\x86R.", METADATA_NAMES, "p")
    assert by_name.kind == read_pickle(module + b"K\0\x85R.", METADATA_NAMES, "p").kind


LENGTHS = {f"__{rank}_0.distcp": nbytes for rank, nbytes in enumerate((7885, 10851, 7949, 11039))}


@st.composite
def changes(draw):
    """Draw changes of bytes, cuts, doubled parts, and swapped instructions."""
    return draw(
        st.lists(
            st.tuples(
                st.sampled_from(["set", "cut", "double", "insert"]),
                st.floats(0, 1, exclude_max=True),
                st.integers(0, 255),
                st.sampled_from(
                    [b"R", b"b", b"\x81", b"}", b"(", b"t", b"h\0", b"\x94", b"N", b"K\xff", b"\x93", b"0"]
                ),
            ),
            min_size=1,
            max_size=4,
        )
    )


def changed(content, edits):
    content = bytearray(content)
    for kind, where, number, code in edits:
        at = int(where * len(content))
        if kind == "set":
            content[at : at + 1] = bytes([number])
        elif kind == "cut":
            del content[at : at + 1 + number % 8]
        elif kind == "double":
            content[at:at] = content[at : at + number]
        else:
            content[at:at] = code
    return bytes(content)


def instructions(content):
    """Cut a pickle into its instructions, without frames."""
    found = list(pickletools.genops(content))
    ends = [position for _, _, position in found[1:]] + [len(content)]
    return [content[begin:end] for (op, _, begin), end in zip(found, ends, strict=True) if op.name != "FRAME"]


@given(edits=changes(), swaps=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000)), max_size=3))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_metadata_are_read_or_refused(torch_files, edits, swaps):
    whole = instructions((torch_files / "sharded" / ".metadata").read_bytes())
    for one, other in swaps:
        one, other = one % len(whole), other % len(whole)
        whole[one], whole[other] = whole[other], whole[one]
    content = b"".join(whole)
    for data in {content, changed(content, edits)}:
        try:
            found = decode_metadata(data, "p", lambda file: LENGTHS.get(file, 0))
        except CheckpointError:
            continue
        assert all(type(shape) is tuple for _, shape in found.tensors.values())


@given(edits=changes())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_files_are_read_or_refused(torch_files, tmp_path_factory, edits):
    directory = tmp_path_factory.mktemp("changed")
    shutil.copyfile(torch_files / "no-crc32" / ".metadata", directory / ".metadata")
    content = (torch_files / "no-crc32" / "__0_0.distcp").read_bytes()
    content = changed(content, edits)[: len(content)].ljust(len(content), b"\0")
    (directory / "__0_0.distcp").write_bytes(content)
    source = open_foreign(directory)
    try:
        assert set(source.values) | set(source.unreadable) == {"n"}
        assert source.read("w").shape == (3,)
    except CheckpointDamaged as error:
        assert error.tensor == "w"  # noqa: PT017 (many of these changes are harmless)
    finally:
        source.close()
        shutil.rmtree(directory)
