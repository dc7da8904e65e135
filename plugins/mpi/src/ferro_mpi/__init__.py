"""The MPI backend of ferro: native collectives of the machine's MPI through mpi4py."""
