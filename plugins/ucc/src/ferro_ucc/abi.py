"""The C interface of libucc for ctypes: its constants and structures.

They follow UCC's public headers `ucc.h`, `ucc_def.h` and `ucc_status.h` on a 64-bit machine. Between 1.1 and 1.8 no
field moved; `ucc_coll_args_t` only grew at its end, from 184 to 200 bytes, so `CollArgs` ends in zeros. Offsets and
sizes in bytes, as a test asserts them:

    LibParams          40   mask 0, thread_mode 8, coll_types 16, reduction_types 24, sync_type 32
    OobColl            40   allgather 0, req_test 8, req_free 16, coll_info 24, n_oob_eps 32,
                            oob_ep 36
    ContextParams      80   mask 0, type 8, sync_type 12, oob 16, ctx_id 56, mem_params 64
    TeamParams        208   mask 0, flags 8, ordering 16, outstanding_colls 24, ep 32, ep_list 40,
                            ep_range 48, team_size 56, sync_type 64, oob 72, p2p_conn 112,
                            mem_params 152, ep_map 168, id 200
    BufferInfo         32   buffer 0, count 8, datatype 16, mem_type 24
    BufferInfoV        40   buffer 0, counts 8, displacements 16, datatype 24, mem_type 32
    CollArgs          256   mask 0, coll_type 8, src 16, dst 56, op 96, flags 104, root 112,
                            error_type 120, tag 124, global_work_buffer 128, cb 136, timeout 152,
                            active_set 160, later 184

`ucc_coll_req_h` points to the request's status, an int32. Handles are pointers.
"""

from __future__ import annotations

import ctypes
import enum
from ctypes import POINTER, c_double, c_int, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p


class UccStatus(enum.IntEnum):
    """`ucc_status_t`: negative values are errors."""

    OK = 0
    IN_PROGRESS = 1
    INITIALIZED = 2
    NOT_SUPPORTED = -1
    NO_MESSAGE = -6
    TIMED_OUT = -8


class CollType(enum.IntEnum):
    """`ucc_coll_type_t`."""

    ALL_GATHER = 1 << 0
    ALL_GATHER_V = 1 << 1
    ALL_REDUCE = 1 << 2
    ALL_TO_ALL_V = 1 << 4
    BROADCAST = 1 << 6
    GATHER_V = 1 << 10
    REDUCE = 1 << 11
    REDUCE_SCATTER_V = 1 << 13
    SCATTER_V = 1 << 15


class UccOp(enum.IntEnum):
    """`ucc_reduction_op_t`, without the logical and located ones."""

    SUM = 0
    PROD = 1
    MAX = 2
    MIN = 3
    BAND = 7
    BOR = 8
    BXOR = 9


class UccDatatype(enum.IntEnum):
    """`ucc_datatype_t`: a predefined type's number, shifted past the 3 bits of its class."""

    INT8 = 0 << 3
    INT16 = 1 << 3
    INT32 = 2 << 3
    INT64 = 3 << 3
    UINT8 = 5 << 3
    UINT16 = 6 << 3
    UINT32 = 7 << 3
    UINT64 = 8 << 3
    FLOAT32 = 11 << 3
    FLOAT64 = 12 << 3


class ArgsFlag(enum.IntFlag):
    """`ucc_coll_args_flags_t`."""

    IN_PLACE = 1 << 0
    COUNT_64BIT = 1 << 2
    DISPLACEMENTS_64BIT = 1 << 3


THREAD_SINGLE = 0
MEMORY_HOST = 0
MEMORY_UNKNOWN = 5  # for a buffer that a rank does not pass
EP_RANGE_CONTIGUOUS = 0
CONTEXT_SHARED = 1

# Bits of a structure's mask, which says which of its fields are set.
LIB_FIELD_THREAD_MODE = 1 << 0
CONTEXT_FIELD_TYPE = 1 << 0
CONTEXT_FIELD_OOB = 1 << 2
TEAM_FIELD_EP = 1 << 2
TEAM_FIELD_EP_RANGE = 1 << 4
TEAM_FIELD_OOB = 1 << 7
TEAM_FIELD_ID = 1 << 11
ARGS_FIELD_FLAGS = 1 << 0
MAX_TEAM_ID = (1 << 15) - 1

# (send buffer, receive buffer, bytes of each rank, coll_info, request) -> status
AllGatherFunction = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_void_p, POINTER(c_void_p))
RequestFunction = ctypes.CFUNCTYPE(c_int, c_void_p)


class LibParams(ctypes.Structure):
    """`ucc_lib_params_t`."""

    _fields_ = (
        ("mask", c_uint64),
        ("thread_mode", c_int),
        ("coll_types", c_uint64),
        ("reduction_types", c_uint64),
        ("sync_type", c_int),
    )


class OobColl(ctypes.Structure):
    """`ucc_oob_coll_t`: the all-gather by which the library exchanges addresses before it is connected."""

    _fields_ = (
        ("allgather", AllGatherFunction),
        ("req_test", RequestFunction),
        ("req_free", RequestFunction),
        ("coll_info", c_void_p),
        ("n_oob_eps", c_uint32),
        ("oob_ep", c_uint32),
    )


class ContextParams(ctypes.Structure):
    """`ucc_context_params_t`."""

    _fields_ = (
        ("mask", c_uint64),
        ("type", c_int),
        ("sync_type", c_int),
        ("oob", OobColl),
        ("ctx_id", c_uint64),
        ("mem_params", c_uint64 * 2),
    )


class TeamParams(ctypes.Structure):
    """`ucc_team_params_t`."""

    _fields_ = (
        ("mask", c_uint64),
        ("flags", c_uint64),
        ("ordering", c_int),
        ("outstanding_colls", c_uint64),
        ("ep", c_uint64),
        ("ep_list", c_void_p),
        ("ep_range", c_int),
        ("team_size", c_uint64),
        ("sync_type", c_int),
        ("oob", OobColl),
        ("p2p_conn", c_void_p * 5),
        ("mem_params", c_uint64 * 2),
        ("ep_map", c_uint64 * 4),
        ("id", c_uint64),
    )


class BufferInfo(ctypes.Structure):
    """`ucc_coll_buffer_info_t`."""

    _fields_ = (("buffer", c_void_p), ("count", c_uint64), ("datatype", c_uint64), ("mem_type", c_int))


class BufferInfoV(ctypes.Structure):
    """`ucc_coll_buffer_info_v_t`: a buffer of one block per rank."""

    _fields_ = (
        ("buffer", c_void_p),
        ("counts", c_void_p),
        ("displacements", c_void_p),
        ("datatype", c_uint64),
        ("mem_type", c_int),
    )


class CollBuffer(ctypes.Union):
    """A whole buffer, or a buffer of blocks."""

    _fields_ = (("info", BufferInfo), ("info_v", BufferInfoV))


class CollArgs(ctypes.Structure):
    """`ucc_coll_args_t`."""

    _fields_ = (
        ("mask", c_uint64),
        ("coll_type", c_int),
        ("src", CollBuffer),
        ("dst", CollBuffer),
        ("op", c_int),
        ("flags", c_uint64),
        ("root", c_uint64),
        ("error_type", c_int),
        ("tag", c_uint16),
        ("global_work_buffer", c_void_p),
        ("cb", c_void_p * 2),
        ("timeout", c_double),
        ("active_set", c_uint64 * 3),
        ("later", c_uint64 * 9),
    )
