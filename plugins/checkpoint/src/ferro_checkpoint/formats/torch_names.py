"""The list of names that pickles of torch may hold, and what is made of each: nothing of torch is needed or called."""

from __future__ import annotations

from typing import Any

from ferro_checkpoint.formats.pickle_names import Built, Maker, Names, built_by
from ferro_checkpoint.layout.dtypes import ITEM_BYTES

MOST_DIMS = 64

_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "complex128": "complex128",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "float8_e4m3fnuz",
    "float8_e5m2fnuz": "float8_e5m2fnuz",
}
_STORAGES = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "complex128",
}


class TorchDtype(str):
    """A dtype of torch, by its name in safetensors files, or NumPy's."""

    __slots__ = ()


class StorageClass(str):
    """The class of a storage: its dtype, or "" for an untyped one, whose length is in bytes."""

    __slots__ = ()


class TorchSize(tuple[int, ...]):
    """A torch.Size."""

    __slots__ = ()


def item_bytes(dtype: str) -> int:
    """Return the bytes of an element of a dtype of `TorchDtype`."""
    if dtype in ITEM_BYTES:
        return ITEM_BYTES[dtype]
    return 16 if dtype == "complex128" else 1


def _size(args: tuple[Any, ...]) -> TorchSize:
    (sizes,) = args
    if type(sizes) not in (tuple, list, TorchSize) or len(sizes) > MOST_DIMS or not all(map(_is_size, sizes)):
        raise ValueError("a torch.Size is made of something else than sizes")
    return TorchSize(sizes)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _ordered_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    if args:
        raise ValueError("an OrderedDict is made with arguments")
    return {}


def _enum_member(args: tuple[Any, ...]) -> Built:
    """Some releases of Python 3.11 write a member of an enum as getattr(class, name); nothing else may come so."""
    if len(args) != 2 or args[0] is not _MEM_FORMAT or type(args[1]) is not str:
        raise ValueError("getattr of something else than the enum of memory formats")
    return Built("_MEM_FORMAT_ENCODING", args[1:])


def _layout(args: tuple[Any, ...]) -> Built:
    return Built("layout", args)


_COMMON: Names = {
    ("torch", "Size"): Maker(_size),
    ("collections", "OrderedDict"): Maker(_ordered_dict),
    ("torch.serialization", "_get_layout"): Maker(_layout),
    **{("torch", name): TorchDtype(dtype) for name, dtype in _DTYPES.items()},
}

_METADATA = "torch.distributed.checkpoint.metadata"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"  # where torch before 2.3 had TensorProperties
_MEM_FORMAT = built_by("_MEM_FORMAT_ENCODING")
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path")

METADATA_NAMES: Names = {
    **_COMMON,
    **{
        (_METADATA, kind): built_by(kind)
        for kind in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
        )
    },
    (_SHARDED, "TensorProperties"): built_by("TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"): _MEM_FORMAT,
    (_SHARDED, "MEM_FORMAT_ENCODING"): _MEM_FORMAT,
    ("builtins", "getattr"): Maker(_enum_member),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): built_by("_StorageInfo"),
    **{(module, kind): built_by("Path") for module in ("pathlib", "pathlib._local") for kind in _PATHS},
}
"""For `.metadata`."""

ARCHIVE_NAMES: Names = {
    **_COMMON,
    ("torch._utils", "_rebuild_tensor_v2"): built_by("tensor"),
    ("torch._utils", "_rebuild_tensor_v3"): built_by("tensor with dtype"),
    ("torch._utils", "_rebuild_parameter"): built_by("parameter"),
    **{("torch", name): StorageClass(dtype) for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): StorageClass(""),
    ("torch", "UntypedStorage"): StorageClass(""),
}
"""For the data.pkl of an archive that torch.save has written."""
