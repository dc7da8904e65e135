"""ferro-nccl: the NCCL backend of ferro, collectives on CuPy arrays between GPUs.

ferro finds it once it is installed: `ferro.init("nccl")`.
"""
