"""ferro-nccl: the NCCL backend of ferro, collectives on CuPy arrays between GPUs.

Installed, it is found by itself: `ferro.init("nccl")`.
"""
