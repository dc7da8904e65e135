"""A stand-in for CuPy and NCCL: streams are threads, GPU memory is NumPy's, ranks are threads."""

from .machine import Machine

__all__ = ["Machine"]
