"""Arrays that users pass in, as buffers, and results of the same kind."""

from ferro.arrays.dlpack import SupportsDLPack
from ferro.arrays.dtypes import dtype_from_name, dtype_name, dtype_problem
from ferro.arrays.input_array import Input, InputArray, device_of, lost_meaning, output_array

__all__ = [
    "Input",
    "InputArray",
    "SupportsDLPack",
    "device_of",
    "dtype_from_name",
    "dtype_name",
    "dtype_problem",
    "lost_meaning",
    "output_array",
]
