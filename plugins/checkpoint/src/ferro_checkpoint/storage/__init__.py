"""Where checkpoints are: directories of files, local or in an object store."""
