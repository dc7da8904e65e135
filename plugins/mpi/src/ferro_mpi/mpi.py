"""mpi4py's MPI, imported without starting it: everyone here imports it from this module.

Importing `mpi4py.MPI` starts MPI unless it is told not to. A program that imported it before us
has done so; see `library`.
"""

import sys

import mpi4py

if "mpi4py.MPI" not in sys.modules:
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False

from mpi4py import MPI

__all__ = ["MPI"]
