"""The NCCL backend of ferro: collectives on CuPy arrays between GPUs."""
