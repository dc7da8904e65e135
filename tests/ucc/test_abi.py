"""The layout of libucc's structures: as the table says, and as a C compiler sees them."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest

from ferro.collectives.reduction import reduction_for
from ferro_ucc import abi, operations
from ferro_ucc.operations import Operation
from ferro_ucc.reductions import native_reduction

# ucc_coll_args_t once more, written down from UCC's documentation, and what tests ask of it.
READER = """
#include <stddef.h>
#include <stdint.h>
struct plain { void *buffer; uint64_t count; uint64_t datatype; int mem_type; };
struct uneven {
    void *buffer; uint64_t *counts; uint64_t *starts; uint64_t datatype; int mem_type;
};
union side { struct plain plain; struct uneven uneven; };
struct args {
    uint64_t mask;
    int kind;
    union side src, dst;
    int op;
    uint64_t flags, root;
    int error_type;
    uint16_t tag;
    void *work;
    struct { void (*function)(void *, int); void *data; } callback;
    double timeout;
    struct { uint64_t start; int64_t stride; uint64_t size; } active_set;
};
size_t size_of_args(void) { return sizeof(struct args); }
void read_args(const struct args *a, uint64_t *out) {
    out[0] = a->mask; out[1] = a->kind; out[2] = a->op; out[3] = a->flags; out[4] = a->root;
    out[5] = (a->tag != 0) + (a->work != 0) + (a->timeout != 0) + (a->active_set.size != 0)
        + (a->callback.function != 0) + a->error_type;
}
void read_plain(const struct args *a, int dst, uint64_t *out) {
    const struct plain *p = dst ? &a->dst.plain : &a->src.plain;
    out[0] = (uint64_t)p->buffer; out[1] = p->count; out[2] = p->datatype; out[3] = p->mem_type;
}
void read_uneven(const struct args *a, int dst, uint64_t *out, int ranks) {
    const struct uneven *p = dst ? &a->dst.uneven : &a->src.uneven;
    out[0] = (uint64_t)p->buffer; out[1] = p->datatype; out[2] = p->mem_type;
    for (int i = 0; i < ranks; i++) {
        out[3 + i] = p->counts[i]; out[3 + ranks + i] = p->starts[i];
    }
}
"""


def table() -> dict[str, tuple[int, dict[str, int]]]:
    """Read the table in the docstring: structure -> size, field -> offset."""
    found: dict[str, tuple[int, dict[str, int]]] = {}
    name = ""
    for line in (abi.__doc__ or "").splitlines():
        if start := re.match(r" {4}(\w+) +(\d+) +(?=\w+ \d)", line):
            name = start[1]
            found[name] = (int(start[2]), {})
            line = line[start.end() :]
        elif not line.startswith(" " * 20):
            continue
        found[name][1].update((field, int(at)) for field, at in re.findall(r"(\w+) (\d+)", line))
    return found


@pytest.mark.parametrize("name", sorted(table()))
def test_structures_are_laid_out_as_the_table_says(name):
    kind = getattr(abi, name)
    size, offsets = table()[name]
    assert ctypes.sizeof(kind) == size
    assert {field[0]: getattr(kind, field[0]).offset for field in kind._fields_} == offsets


def test_the_table_has_every_structure():
    made = {k for k, v in vars(abi).items() if isinstance(v, type) and issubclass(v, ctypes.Structure)}
    assert made == set(table())


@pytest.fixture
def reader(compile_library) -> ctypes.CDLL:
    library = ctypes.CDLL(str(compile_library("reader", READER)))
    library.size_of_args.restype = ctypes.c_size_t
    return library


def read(reader: ctypes.CDLL, operation: Operation) -> list[int]:
    out = (ctypes.c_uint64 * 6)()
    reader.read_args(ctypes.byref(operation.args), out)
    return list(out)


def read_plain(reader: ctypes.CDLL, operation: Operation, *, dst: bool) -> list[int]:
    out = (ctypes.c_uint64 * 4)()
    reader.read_plain(ctypes.byref(operation.args), int(dst), out)
    return list(out)


def read_uneven(reader: ctypes.CDLL, operation: Operation, ranks: int, *, dst: bool) -> list[int]:
    out = (ctypes.c_uint64 * (3 + 2 * ranks))()
    reader.read_uneven(ctypes.byref(operation.args), int(dst), out, ranks)
    return list(out)


def test_ours_reaches_beyond_what_every_version_reads(reader):
    assert ctypes.sizeof(abi.CollArgs) > reader.size_of_args() + 16  # two more pointers since 1.5


def test_c_reads_an_all_reduce(reader):
    buffer = np.zeros(5)
    native = native_reduction(reduction_for("prod", buffer.dtype, 2))
    made = operations.all_reduce(buffer, native)
    assert read(reader, made) == [1, 4, 1, 1, 0, 0]
    assert read_plain(reader, made, dst=True) == [buffer.ctypes.data, 5, 12 << 3, 0]


def test_c_reads_a_reduce_on_either_side(reader):
    buffer = np.zeros(3, np.int16)
    native = native_reduction(reduction_for("max", buffer.dtype, 2))
    at_root = operations.reduce(buffer, native, 1, 1)
    assert read(reader, at_root) == [1, 1 << 11, 2, 1, 1, 0]
    assert read_plain(reader, at_root, dst=True) == [buffer.ctypes.data, 3, 1 << 3, 0]
    elsewhere = operations.reduce(buffer, native, 1, 0)
    assert read(reader, elsewhere)[3] == 0
    assert read_plain(reader, elsewhere, dst=False) == [buffer.ctypes.data, 3, 1 << 3, 0]


def test_c_reads_sizes_in_bytes(reader):
    source, out = np.zeros(6, np.float32), np.zeros(7, np.float32)
    made = operations.all_to_all(source, out, [1, 2, 3], [0, 4, 3])
    assert read(reader, made) == [1, 1 << 4, 0, 4 | 8, 0, 0]
    address = source.ctypes.data
    sent = read_uneven(reader, made, 3, dst=False)
    assert sent == [address, 5 << 3, 0, 4, 8, 12, 0, 4, 12]
    came = read_uneven(reader, made, 3, dst=True)
    assert came[3:] == [0, 16, 12, 0, 0, 16]


def test_c_reads_a_reduce_scatter_in_elements(reader):
    source, out = np.zeros(5, np.float32), np.zeros(3, np.float32)
    native = native_reduction(reduction_for("sum", source.dtype, 2))
    made = operations.reduce_scatter(source, out, [2, 3], native)
    assert read(reader, made) == [1, 1 << 13, 0, 4 | 8, 0, 0]
    assert read_plain(reader, made, dst=False) == [source.ctypes.data, 5, 11 << 3, 0]
    assert read_uneven(reader, made, 2, dst=True) == [out.ctypes.data, 11 << 3, 0, 2, 3, 0, 2]


@pytest.mark.parametrize("at_root", [True, False])
def test_c_reads_rooted_movements(reader, at_root):
    block, whole = np.zeros(2), np.zeros(5) if at_root else None
    gather = operations.gather(block, whole, [2, 3], 0)
    scatter = operations.scatter(block, whole, [2, 3], 0)
    assert read(reader, gather)[1:4] == [1 << 10, 0, 4 | 8 | at_root]
    assert read(reader, scatter)[1:4] == [1 << 15, 0, 4 | 8 | at_root]
    if whole is not None:
        blocks = [whole.ctypes.data, 5 << 3, 0, 16, 24, 0, 16]
        assert read_uneven(reader, gather, 2, dst=True) == blocks
        assert read_uneven(reader, scatter, 2, dst=False) == blocks
    else:
        assert read_plain(reader, gather, dst=False) == [block.ctypes.data, 16, 5 << 3, 0]
        assert read_plain(reader, scatter, dst=True) == [block.ctypes.data, 16, 5 << 3, 0]
